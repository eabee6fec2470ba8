"""The cycle, which is the training between two pruning events, and what it leaves behind: checkpoints and a record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl

from lightning_cap.callbacks.checkpoint_io import save_checkpoint
from lightning_cap.export.safetensors import save_weights, sparsity_stem
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.compat import averaged_models
from lightning_cap.utilities import distributed
from lightning_cap.utilities.records import Record


@dataclass
class Cycle:
    """The cycle that a run is in.

    Attributes:
        goal: Sparsity of its event.
        best: Best value of the monitored metric so far, None if there is none.
        saved: Whether its end has been saved.
    """

    goal: float
    best: float | None = None
    saved: bool = False

    def improves(self, value: float | None, mode: Literal["min", "max"]) -> bool:
        """Whether ``value`` is better than the best so far; it is then the best."""
        if value is None or value != value:
            return False
        if self.best is not None and not (value > self.best if mode == "max" else value < self.best):
            return False
        self.best = value
        return True


@dataclass(frozen=True)
class CycleRecord(Record):
    """A line of the final table: the dense model, or the end or the best epoch of a cycle.

    Attributes:
        goal: Sparsity that was asked for, 0 for the dense model.
        epoch: Whose weights they are, from 0.
        value: Of the monitored metric, None if it is not known.
        sparsity: Measured: zeros over all weights of the targets.
        best: Whether this is the best epoch of the cycle instead of its end.
        checkpoint: Path of the Lightning checkpoint, empty if none was written.
        weights: Path of the ``.safetensors`` file, empty if none was written.
    """

    kind: ClassVar[str] = "cycle"
    version: ClassVar[int] = 1

    goal: float
    epoch: int
    value: float | None
    sparsity: float
    best: bool = False
    checkpoint: str = ""
    weights: str = ""

    def with_files(self, folder: Path) -> CycleRecord:
        """The same, with the names of its files in a folder."""
        stem = folder / (sparsity_stem(self.goal) + ("-best" if self.best else ""))
        return replace(self, checkpoint=f"{stem}.ckpt", weights=f"{stem}.safetensors")


def checkpoint_dir(trainer: pl.Trainer, dirpath: str | None) -> Path:
    """``dirpath``, or ``checkpoints`` in the logger's folder, or in ``default_root_dir``. Call it on every rank."""
    if dirpath is not None:
        return Path(dirpath)
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"


def monitored(metrics: Mapping[str, Any], monitor: str | None) -> tuple[str | None, float | None]:
    """Name and value of the monitored metric; ``monitor=None`` takes the logged validation accuracy, if there is one."""
    if monitor is None:
        names = [name for name in metrics if "val" in name.lower() and "acc" in name.lower()]
        monitor = min(names, key=len, default=None)
    if monitor is None or monitor not in metrics:
        return monitor, None
    return monitor, float(metrics[monitor])


def save_cycle(trainer: pl.Trainer, module: pl.LightningModule, targets: Targets, record: CycleRecord) -> None:
    """Write ``record.weights`` (plain safetensors), then ``record.checkpoint`` (the Trainer's). Call it on every rank.

    A checkpoint says that its cycle is saved, so it comes last: a kill in between leaves none that says so too early.
    """
    with distributed.raise_on_all_ranks(f"Writing {record.weights}"):
        if trainer.is_global_zero:
            averages = averaged_models(trainer)
            model = getattr(averages[0], "module", averages[0]) if averages else module
            save_weights(model, targets, Path(record.weights), sparsity=record.sparsity, goal=record.goal)
    save_checkpoint(trainer, record.checkpoint)
