"""A small classifier of the package's own, and data for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SIZES: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
    "global_pool": "avg",
}


NAME = "vit_tiny_patch16_224"


SMALL = {k: v for k, v in SIZES.items() if k != "num_classes"}


def vit(**changes: Any) -> VisionTransformer:
    return VisionTransformer(**{**SIZES, **changes})


def batch(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, 1, 8, 8), torch.randint(10, (n,))


def loader(n: int = 8, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*batch(n)), batch_size=batch_size)


def trainer(path: Path, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "default_root_dir": path,
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**settings, **changes})


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
