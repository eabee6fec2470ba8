"""Two pruning callbacks in one run: the first prunes units, the second the weights that are left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from lightning_cap.callbacks.cycle import Cycle
from lightning_cap.callbacks.saving_run import SavingRun
from lightning_cap.errors import UnsupportedError


def pruning_callbacks(trainer: pl.Trainer) -> list[SavingRun]:
    """Those of a run, in order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, SavingRun)]  # type: ignore[attr-defined]


def refuse_wrong_companions(trainer: pl.Trainer) -> None:
    """Refuse callbacks in another order than units first, and weights that grow back inside units that are gone.

    Raises:
        UnsupportedError: They are so.
    """
    first, *others = pruning_callbacks(trainer)
    for other in others:
        if other.pruner.takes_units:
            raise UnsupportedError(
                f"callbacks: {_named(other)} comes after {_named(first)}. Put the one that prunes units first, so that the other "
                "prunes the weights that are left."
            )
        if first.pruner.takes_units and (other.pruner.regrows or other.schedule.regrows):
            raise UnsupportedError(
                f"callbacks: weights of {_named(other)} grow back, but those of units that {_named(first)} has pruned cannot. Give "
                "it a pruner and a schedule that do not regrow."
            )


def adopt_pruned_units(trainer: pl.Trainer) -> None:
    """Take the weights of pruned units as pruned in the masks of the other callback, and keep those masks in force."""
    first, *others = pruning_callbacks(trainer)
    for other in others if first.pruner.takes_units else ():
        masks = other.masks
        masks.update({name: mask for name, mask in first.masks.items() if name in masks})
        masks.apply_to_weights()
        for optimizer in trainer.optimizers:
            masks.apply_to_optimizer(optimizer)


def cycle_starts(trainer: pl.Trainer) -> list[int]:
    """Epochs at which an event of any callback begins a cycle."""
    return sorted({epoch for callback in pruning_callbacks(trainer) for epoch in callback.starts})


def goes_on(trainer: pl.Trainer, cycle: Cycle) -> bool:
    """Whether a cycle is trained on when a run goes on: no event of any callback has come after it, or comes now."""
    callbacks = pruning_callbacks(trainer)
    later = (other.cycle for other in callbacks if other.cycle is not None)
    due = any(callback.is_due(trainer.current_epoch) for callback in callbacks)
    return not due and all(other.begun <= cycle.begun for other in later)


def end_cycles(trainer: pl.Trainer, module: pl.LightningModule, epoch: int, metrics: Mapping[str, Any]) -> None:
    """Save the cycles of all callbacks that end with an epoch and are not saved yet."""
    for callback in pruning_callbacks(trainer):
        callback.end_cycle(trainer, module, epoch, metrics)


def _named(callback: SavingRun) -> str:
    return f"{type(callback).__name__}(pruner={type(callback.pruner).__name__})"
