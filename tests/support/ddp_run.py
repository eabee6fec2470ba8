"""A run on one or several ranks that writes down what each of them has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_cap.pruners import CAPUnits
from lightning_cap.sparsity import Flops
from tests.support.toy import Toy, ToyData, callback, cap, loaders, loss, trainer


class Dump(pl.Callback):
    """Every rank writes its weights right after the event at epoch 0, and at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            self._write(trainer, pl_module, "event")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._write(trainer, pl_module, "end")

    def _write(self, trainer: Any, pl_module: Any, when: str) -> None:
        weight = pl_module.net[4].weight.detach().clone()
        torch.save(weight, self.folder / f"{when}-{trainer.world_size}-{trainer.global_rank}.pt")


class Calibrated(Toy):
    """Draws calibration samples with augmentation; rank 1 fails on request."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.fail = fail

    def calibration_dataloader(self) -> Any:
        return DataLoader(ToyData(), batch_size=8)

    def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.fail and self.global_rank == 1 and self.trainer.current_epoch == 1:
            raise ValueError("the disk of rank 1 is gone")
        return loss(self, batch)


def ddp_run(
    folder: Path,
    devices: int,
    fail: bool = False,
    options: dict[str, Any] | None = None,
    units: bool = False,
    **settings: Any,
) -> None:
    """Two epochs, with an event at each; ``options`` are the Trainer's, ``settings`` those of CAP, or of CAPUnits."""
    pl.seed_everything(4, verbose=False)
    kind = {"pruner": CAPUnits(**settings), "cost": Flops()} if units else {"pruner": cap(**settings)}
    cb = callback({0: 0.5, 1: 0.75}, **kind, dirpath=str(folder / "out"))
    strategy = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    trainer(folder, cb, Dump(folder), max_epochs=2, **{**strategy, **(options or {})}).fit(
        Calibrated(fail), **loaders()
    )


def written(folder: Path, when: str, world: int) -> list[torch.Tensor]:
    """What the ranks of a run had at that time."""
    return [torch.load(folder / f"{when}-{world}-{rank}.pt") for rank in range(world)]


def assert_pruned_alike(folder: Path) -> None:
    """Two ranks ended with the same weights, three quarters of them zero."""
    one, other = written(folder, "end", 2)
    assert torch.equal(one, other)
    assert float((one == 0).float().mean()) == 0.75
