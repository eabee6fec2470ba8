"""What belongs to one ``fit``: live tensors and the resolved schedule."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cap.calibration.sources import Trial
from lightning_cap.callbacks.run_files import RunFiles
from lightning_cap.fisher.memory_plan import MemoryPlan
from lightning_cap.pruners import Pruner
from lightning_cap.schedules import SparsitySchedule
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets


class Run:
    """Targets, masks, events and files of one ``fit``.

    Attributes:
        begins: The first epoch whose start this ``fit`` comes to, None before it trains.
        trials: What the dry run has found out about calibration; see `PruningEvent`.
        plans: Of the memory of the events to come, one for each of their pruners; none before they are made.
        starts: Epochs of the events that begin a cycle.
        phases: Epochs of the events that begin a sparse phase; see `sparse_phases`.
    """

    def __init__(
        self,
        targets: Targets,
        masks: MaskSet,
        events: dict[int, float],
        files: RunFiles,
        pruner: Pruner,
        schedule: SparsitySchedule,
    ) -> None:
        self.targets, self.masks, self.events, self.files = targets, masks, events, files
        self.begins: int | None = None
        self.trials: dict[str, Trial] = {}
        self.plans: list[MemoryPlan] = []
        self.starts = cycle_starts(events, pruner)
        self.phases = sparse_phases(events, schedule)

    def done(self, epoch: int) -> float:
        """Events before that of ``epoch``, over all."""
        return list(self.events).index(epoch) / len(self.events)

    def missed(self, done: Collection[int]) -> dict[int, float]:
        """Events whose epoch this ``fit`` comes to, and that are not among those done."""
        begins = 0 if self.begins is None else self.begins
        return {epoch: goal for epoch, goal in self.events.items() if epoch not in done and epoch >= begins}

    def warn_of_missed(self, done: Collection[int]) -> None:
        """Say at the end which events did not come."""
        missed = self.missed(done)
        if missed:
            when = "Nothing was trained" if self.begins is None else "Training ended"
            rank_zero_warn(f"{when} before the pruning events of epochs {missed}; the model was not pruned that far.")


def is_dry(trainer: pl.Trainer) -> bool:
    """Whether this is a ``fast_dev_run``."""
    return bool(getattr(trainer, "fast_dev_run", False))


def writes_files(trainer: pl.Trainer) -> bool:
    """Whether a run may leave files: neither in a ``fast_dev_run`` nor in a plan, whose Trainer has ``plans = True``."""
    return not is_dry(trainer) and not getattr(trainer, "plans", False)


def cycle_starts(events: Mapping[int, float], pruner: Pruner) -> list[int]:
    """Epochs of the events that begin a cycle: all; with a pruner that regrows, those that change the goal."""
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
