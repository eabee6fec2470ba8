"""A small run of digits, to be planned."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from timm.models.vision_transformer import VisionTransformer

from lightning_cap import CAPPruningCallback, VisionClassifier
from lightning_cap.data import DigitsDataModule
from lightning_cap.planning import RunPlan, plan_fit, plan_oneshot
from lightning_cap.planning.machine import Settings
from lightning_cap.pruners import CAP

QUICK = Settings(measure=False)


def small_model(**options: Any) -> VisionClassifier:
    """Two blocks of width 16."""
    sizes = {
        "img_size": 8,
        "patch_size": 4,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
    }
    return VisionClassifier(VisionTransformer(**{**sizes, "global_pool": "avg"}), **options)


def pruning(**options: Any) -> CAPPruningCallback:
    """CAP in small blocks, to 50 and 75 %."""
    given = {"schedule": {2: 0.5, 4: 0.75}, "pruner": CAP(block_size=16, num_gradients=64, damp=1e-5)}
    return CAPPruningCallback(**{**given, **options})


def configured(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A Trainer that is planned for."""
    given = {"max_epochs": 6, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return pl.Trainer(callbacks=list(callbacks), **{**given, **options})


def planned(*callbacks: pl.Callback, settings: Settings = QUICK, batch_size: int = 64, **options: Any) -> RunPlan:
    """The plan of a run of digits."""
    trainer = configured(*(callbacks or (pruning(),)), **options)
    return plan_fit(trainer, small_model(), DigitsDataModule(batch_size=batch_size), settings)


def planned_oneshot(settings: Settings = QUICK, **given: Any) -> RunPlan:
    """The plan of a comparison."""
    asked = {
        "pruners": CAP(block_size=16, num_gradients=64, damp=1e-5), "sparsities": [0.5, 0.75], "seeds": (0,), "include": None,
        "exclude": None, "folder": None, "num_recomputations": 1, "recomputation_path": "exponential", "grids": None,
        "surface": None, "fisher_block": 0, "save_weights": None, "loss_samples": 64, "max_rows_memory": None,
    }  # fmt: skip
    return plan_oneshot(configured(), small_model(), DigitsDataModule(batch_size=64), settings, **{**asked, **given})
