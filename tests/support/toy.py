"""A small LightningModule that knows nothing of pruning, and random data that it can learn."""

from __future__ import annotations

import atexit
import random
from multiprocessing import parent_process
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_cap import CAPPruningCallback, CyclicLinearLR
from lightning_cap.pruners import CAP
from lightning_cap.schedules import SparsitySchedule, SparsitySteps
from tests.support.groups import end_group

CLASSES, FEATURES = 4, 12
TARGET = "net.4.weight"  # the one target of `Toy` by default, (16, 16)


def _end_group() -> None:
    if dist.is_initialized():
        end_group()


class ToyData(Dataset[Any]):
    """``(x + noise, y)``; the noise is drawn from Python's, NumPy's and torch's global generators, as augmentation is."""

    def __init__(self, size: int = 64, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(7)
        self.y = torch.arange(size) % CLASSES
        self.x = torch.randn(CLASSES, FEATURES, generator=generator)[self.y]
        self.x = self.x + 0.3 * torch.randn(size, FEATURES, generator=generator)
        self.noise = noise
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append(index)
        jitter = random.random() + float(np.random.rand()) + torch.rand(FEATURES)
        return self.x[index] + self.noise * jitter, self.y[index]


class Toy(pl.LightningModule):
    """A plain user module: logs on every step, keeps metrics, has BatchNorm and dropout."""

    def setup(self, stage: str) -> None:
        """A spawned process ends its group before it exits: torch may abort one whose gloo threads still run."""
        if dist.is_initialized() and parent_process() is not None:
            atexit.unregister(_end_group)
            atexit.register(_end_group)

    def __init__(self, optimizer: str = "adamw", scheduler: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(FEATURES, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(16, 16),
            nn.ReLU(),
            nn.Linear(16, CLASSES),
        )
        self.train_acc, self.val_acc = MulticlassAccuracy(CLASSES), MulticlassAccuracy(CLASSES, average="micro")
        self.optimizer, self.scheduler = optimizer, scheduler
        self.batches: list[list[float]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        out = self(x)
        loss = nn.functional.cross_entropy(out, y)
        self.train_acc(out, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_acc", self.train_acc, on_step=True)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0].flatten().tolist())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        out = self(x)
        self.val_acc(out, y)
        self.log("val_acc", self.val_acc)
        self.log("val_loss", nn.functional.cross_entropy(out, y))

    def configure_optimizers(self) -> Any:
        if self.optimizer == "adamw":
            optimizer: Any = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
        if not self.scheduler:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": CyclicLinearLR(optimizer, min_lr=1e-4), "interval": "step"},
        }


def loaders(size: int = 64, workers: int = 0, batch_size: int = 16) -> dict[str, Any]:
    """Keyword arguments for ``Trainer.fit``."""
    return {
        "train_dataloaders": DataLoader(ToyData(size), batch_size=batch_size, shuffle=True, num_workers=workers),
        "val_dataloaders": DataLoader(ToyData(32, noise=0.0), batch_size=16),
    }


def plain_net() -> nn.Module:
    """A plain model for the features of `ToyData`, always the same; `loss` is that of its outputs."""
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, CLASSES)]
    return nn.Sequential(nn.Flatten(), *layers)


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Of a plain model, as `prune` and the collectors take it."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def cap(**kwargs: Any) -> CAP:
    return CAP(**{"block_size": 16, "num_gradients": 48, "damp": 1e-4, **kwargs})


def callback(schedule: SparsitySchedule | dict[int, float] | None = None, **kwargs: Any) -> CAPPruningCallback:
    if not isinstance(schedule, SparsitySchedule):
        schedule = SparsitySteps(schedule or {1: 0.5, 2: 0.75})
    return CAPPruningCallback(**{"schedule": schedule, "pruner": cap(), **kwargs})


def trainer(path: Any, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    defaults = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(path),
    }
    return pl.Trainer(**{**defaults, "callbacks": list(callbacks), **kwargs})


def zeros(module: nn.Module, name: str = TARGET) -> torch.Tensor:
    return dict(module.named_parameters())[name].detach() == 0
