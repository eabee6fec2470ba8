"""What a run refuses before it begins."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_cap.callbacks.run import is_dry
from lightning_cap.errors import ConfigError, ScheduleError, UnsupportedError
from lightning_cap.pruners import Pruner
from lightning_cap.pruners.base import refuse_splitting
from lightning_cap.schedules import SparsitySchedule

_FAR = 10**5  # an epoch after the end of any schedule


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
