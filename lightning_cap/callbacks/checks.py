"""What a run refuses before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_cap.callbacks.run import is_dry
from lightning_cap.errors import ConfigError, ScheduleError, UnsupportedError
from lightning_cap.export.records import EXPORTS, ExportRecord
from lightning_cap.pruners import Pruner
from lightning_cap.pruners.base import refuse_splitting
from lightning_cap.schedules import SparsitySchedule
from lightning_cap.trainer.records import EVENTS, EventRecord
from lightning_cap.utilities import distributed
from lightning_cap.utilities.records import known_records

_FAR = 10**5  # an epoch after the end of any schedule


def check_settings(num_recomputations: int, save: str, monitor: str | None, mode: str, seed: int) -> None:
    """Refuse arguments of `CAPPruningCallback` that cannot work in any run.

    Raises:
        ConfigError: One is out of range.
    """
    if num_recomputations < 1:
        raise ConfigError(f"num_recomputations={num_recomputations}: give a whole number of at least 1.")
    if save in ("best", "both") and monitor is None:
        raise ConfigError(f"save={save!r} needs monitor=..., the name of a logged metric such as 'val/acc'.")
    for name, value, choices in (("save", save, ("last", "best", "both", "none")), ("mode", mode, ("min", "max"))):
        if value not in choices:
            raise ConfigError(f"{name}={value!r}: choose one of {choices}.")
    if seed < 0:
        raise ConfigError(f"seed={seed}: give a whole number of at least 0.")


def refuse_sharding(trainer: pl.Trainer) -> None:
    """Refuse a strategy that shards parameters.

    Raises:
        UnsupportedError: It does.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise UnsupportedError(
            f"strategy={type(trainer.strategy).__name__}: it shards parameters, and a pruning event needs whole weights. "
            "Use Trainer(strategy='ddp') or a single device."
        )


def refuse_manual(module: pl.LightningModule, pruners: Sequence[Pruner]) -> None:
    """Refuse manual optimization where a pruner needs the loss, or the forward pass that gives it, and there is no other way.

    Raises:
        UnsupportedError: The module has no ``calibration_step``.
    """
    wanted = any(pruner.statistic is not None for pruner in pruners)
    if wanted and not module.automatic_optimization and not hasattr(module, "calibration_step"):
        raise UnsupportedError(
            "automatic_optimization=False: training_step cannot be called for its loss alone. Define "
            "calibration_step(batch, batch_idx) on the LightningModule; let it return the mean loss of the batch."
        )


def refuse_foreign_records(trainer: pl.Trainer, folder: Path | None) -> None:
    """Refuse a folder whose files of records hold something else, which would end the run at its first event.

    Args:
        trainer: Rank 0 reads the files; every rank must call this.
        folder: Where ``events.jsonl`` and ``exports.jsonl`` go, None for nowhere.

    Raises:
        DataError: They do.
    """
    with distributed.raise_on_all_ranks("Reading the records of earlier runs"):
        if trainer.is_global_zero and folder is not None:
            known_records(folder / EVENTS, EventRecord)
            known_records(folder / EXPORTS, ExportRecord)


def resolve_events(
    trainer: pl.Trainer,
    schedule: SparsitySchedule,
    pruner: Pruner,
    num_recomputations: int,
    save_sparsities: Sequence[float] | None,
) -> dict[int, float]:
    """Epoch -> sparsity of the events of a run, checked against the Trainer and the pruner.

    Raises:
        ConfigError: An event cannot be had; the message says which and why.
    """
    max_epochs = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
    if is_dry(trainer):
        return {0: next(iter(schedule.events(_FAR).values()))}  # the wiring is tried, once
    events = schedule.events(max_epochs)
    for sparsity in events.values():
        if sparsity > 0 or not schedule.regrows:  # to 0 all masks are lifted, by no pruner
            pruner.check_sparsity(sparsity)
    if num_recomputations > 1 and pruner.regrows:
        raise ConfigError(
            f"num_recomputations={num_recomputations}: {type(pruner).__name__} exchanges weights in one go at each event. Leave "
            "num_recomputations at 1, and give the schedule more events."
        )
    refuse_splitting(pruner, num_recomputations)
    missing = [s for s in save_sparsities or () if s not in events.values()]
    if missing:
        raise ScheduleError(
            f"save_sparsities={missing}: not in the schedule, which has {sorted(set(events.values()))}."
        )
    return events
