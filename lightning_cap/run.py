"""What belongs to one ``fit``: live tensors and the resolved schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_cap.errors import ConfigError, ScheduleError, UnsupportedError
from lightning_cap.masks import MaskSet
from lightning_cap.pruners import Pruner
from lightning_cap.pruners.base import refuse_splitting
from lightning_cap.schedules import SparsitySchedule
from lightning_cap.targets import Targets

_FAR = 10**5  # an epoch after the end of any schedule


class Run:
    """Targets, masks, events and the folder for checkpoints of one ``fit``.

    Attributes:
        starts: Epochs of the events that begin a cycle.
        phases: Epochs of the events that begin a sparse phase; see `sparse_phases`.
    """

    def __init__(
        self,
        targets: Targets,
        masks: MaskSet,
        events: dict[int, float],
        folder: Path,
        pruner: Pruner,
        schedule: SparsitySchedule,
    ) -> None:
        self.targets, self.masks, self.events, self.folder = targets, masks, events, folder
        self.starts = cycle_starts(events, pruner)
        self.phases = sparse_phases(events, schedule)

    def done(self, epoch: int) -> float:
        """Events before that of ``epoch``, over all."""
        return list(self.events).index(epoch) / len(self.events)


def is_dry(trainer: pl.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``."""
    return bool(getattr(trainer, "fast_dev_run", False))


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
    wanted = any(pruner.num_gradients or pruner.num_inputs for pruner in pruners)
    if wanted and not module.automatic_optimization and not hasattr(module, "calibration_step"):
        raise UnsupportedError(
            "automatic_optimization=False: training_step cannot be called for its loss alone. Define "
            "calibration_step(batch, batch_idx) on the LightningModule; let it return the mean loss of the batch."
        )


def cycle_starts(events: Mapping[int, float], pruner: Pruner) -> list[int]:
    """Epochs of the events that begin a cycle: all; with a pruner that regrows, those that change the target."""
    epochs = list(events)
    return [e for i, e in enumerate(epochs) if not (pruner.regrows and i and events[epochs[i - 1]] == events[e])]


def sparse_phases(events: Mapping[int, float], schedule: SparsitySchedule) -> list[int]:
    """Epochs of the events that begin a sparse phase, where a schedule has dense ones too: it lifts masks (AC/DC).

    The first phase begins with the first event above 0, each other with the one that follows a lift. Which zeros the model
    had before makes no difference. Schedules that lift no masks have no phases.
    """
    if not schedule.regrows or all(events.values()):
        return []
    before = [0.0, *events.values()]
    return [epoch for (epoch, goal), last in zip(events.items(), before, strict=False) if goal and not last]


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
