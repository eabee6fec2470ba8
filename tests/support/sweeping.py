"""A pruning run of a small ViT on the digits, and what its checkpoints are fine-tuned with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_cap.callbacks.state import Restored, RunState, encode_state
from lightning_cap.cli import main
from lightning_cap.trainer.run_records import CycleRecord

MODEL: dict[str, Any] = {
    "class_path": "lightning_cap.VisionClassifier",
    "init_args": {
        "model": {
            "class_path": "timm.models.vision_transformer.VisionTransformer",
            "init_args": {
                "img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 8, "depth": 1, "num_heads": 1,
            },
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    },
}  # fmt: skip


def write_config(path: Path, **trainer: Any) -> Path:
    """A configuration for ``fit`` or ``finetune-sweep``."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    config = {
        "seed_everything": 1,
        "model": MODEL,
        "data": {"class_path": "lightning_cap.data.DigitsDataModule", "init_args": {"batch_size": 256}},
        "trainer": {**quiet, "limit_train_batches": 2, "limit_val_batches": 1, **trainer},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def prune(folder: Path, save: str = "last", schedule: dict[int, float] | None = None, **settings: Any) -> Path:
    """A run that prunes twice; returns its folder."""
    callback = {
        "class_path": "lightning_cap.CAPPruningCallback",
        "init_args": {
            "schedule": schedule or {0: 0.5, 1: 0.75},
            "pruner": {"class_path": "lightning_cap.pruners.Magnitude"},
            "save": save,
            "monitor": "val/acc",
            **settings,
        },
    }
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "run", "version": 0},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = write_config(
        folder / "prune.yaml", max_epochs=2, logger=logger, callbacks=[callback], enable_checkpointing=False
    )
    main(["fit", "--config", str(path)])
    return folder / "run/0" if (folder / "run/0").exists() else next((folder / "run").iterdir())


def state(name: str = "sparsity=0.50.ckpt", goal: float = 0.5, **changes: Any) -> dict[str, Any]:
    """That of a pruning callback, as a checkpoint of this name holds it."""
    line = CycleRecord(goal, 1, 0.7, goal, best="-best" in name, checkpoint=f"runs/{name}")
    masks = {"fc.weight": {"shape": [2, 4], "bits": torch.zeros(1, dtype=torch.uint8)}}
    held = encode_state(RunState(history=[line]), Restored(masks, {}, {}, [], None, None))
    return {**held, **changes}


def checkpoint(folder: Path, name: str = "sparsity=0.50.ckpt", **changes: Any) -> Path:
    """A file with such a state and the weights of a single layer."""
    held = {
        "state_dict": {"fc.weight": torch.zeros(2, 4)},
        "pytorch-lightning_version": "2.6.1",
        "callbacks": {"CAPPruningCallback": state(name, **changes)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(held, folder / name)
    return folder / name
