"""The cycle, which is the training between two pruning events, and what it leaves behind: checkpoints and a record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from lightning_cap.callbacks.checkpoint_io import save_checkpoint
from lightning_cap.callbacks.run_files import RunFiles
from lightning_cap.export.safetensors import save_weights
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.compat import averaged_models
from lightning_cap.trainer.run_records import CycleRecord
from lightning_cap.utilities import distributed


@dataclass
class Cycle:
    """The cycle that a run is in.

    Attributes:
        goal: Sparsity of its event.
        best: Best value of the monitored metric so far, None if there is none.
        saved: Whether its end has been saved.
        begun: The first epoch that is trained in it.
    """

    goal: float
    best: float | None = None
    saved: bool = False
    begun: int = 0

    def improves(self, value: float | None, mode: Literal["min", "max"]) -> bool:
        """Whether ``value`` is better than the best so far; it is then the best."""
        if value is None or value != value:
            return False
        if self.best is not None and not (value > self.best if mode == "max" else value < self.best):
            return False
        self.best = value
        return True


def with_files(record: CycleRecord, files: RunFiles) -> CycleRecord:
    """The record with the names of its files."""
    checkpoint, weights = files.of_cycle(record.goal, record.best)
    return replace(record, checkpoint=str(checkpoint), weights=str(weights))


def monitored(metrics: Mapping[str, Any], monitor: str | None) -> tuple[str | None, float | None]:
    """Name and value of the monitored metric. ``monitor=None`` takes the validation accuracy, or else the only metric of validation
    beside the loss, or else the validation loss.
    """
    if monitor is None:
        validated = sorted((name for name in metrics if "val" in name.lower()), key=len)
        losses = [name for name in validated if "loss" in name.lower()]
        others = [name for name in validated if name not in losses]
        accuracies = [name for name in others if "acc" in name.lower()]
        monitor = next(iter(accuracies or (others if len(others) == 1 else losses)), None)
    if monitor is None or monitor not in metrics:
        return monitor, None
    return monitor, float(metrics[monitor])


def save_cycle(trainer: pl.Trainer, module: pl.LightningModule, targets: Targets, record: CycleRecord) -> None:
    """Write ``record.weights`` (plain safetensors), then ``record.checkpoint`` (the Trainer's). Call it on every rank.

    A checkpoint says that its cycle is saved, so it comes last: a kill in between leaves none that says so too early.
    """
    averages = averaged_models(trainer)
    model = getattr(averages[0], "module", averages[0]) if averages else module
    agree = distributed.fail_together if targets.is_sharded else distributed.raise_on_all_ranks
    with agree(f"Writing {record.weights}"):
        if targets.is_sharded or trainer.is_global_zero:
            save_weights(model, targets, Path(record.weights), sparsity=record.sparsity, goal=record.goal)
    save_checkpoint(trainer, record.checkpoint)


def save_missing(module: pl.LightningModule, targets: Targets, history: Iterable[CycleRecord]) -> None:
    """Write the plain weights that are not there, of checkpoints that are. Call it on every rank, before training goes on.

    Not of distributed checkpoints, which are folders, nor in a run that is sharded.
    """
    if targets.is_sharded:
        return
    with distributed.raise_on_all_ranks("Writing the plain weights that are missing"):
        for record in history if distributed.rank() == 0 else ():
            if record.weights and not Path(record.weights).exists() and Path(record.checkpoint).is_file():
                saved = torch.load(record.checkpoint, map_location="cpu", weights_only=True)["state_dict"]
                now = {name: value.clone() for name, value in module.state_dict().items()}
                module.load_state_dict(saved)
                try:
                    save_weights(module, targets, Path(record.weights), sparsity=record.sparsity, goal=record.goal)
                finally:
                    module.load_state_dict(now)
