"""The steps of a pruning event: from the sparsity that is reached to its goal, by which pruner."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_cap.calibration.statistics import GradientSamples
from lightning_cap.callbacks.run import Run
from lightning_cap.errors import PatternError, ScheduleError
from lightning_cap.pruners import DropAndGrow, Pruner
from lightning_cap.schedules import SparsitySchedule
from lightning_cap.sparsity.cost import StepPath, steps_to
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.patterns import Unstructured
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.divergence import refuse_broken_weights
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_real


@dataclass(frozen=True)
class PruningSteps:
    """From the sparsity that is reached to an event's goal.

    Attributes:
        pruner: The pruner that takes the steps.
        sparsities: The steps; none at all unmasks every weight.
    """

    pruner: Pruner
    sparsities: tuple[float, ...]

    @property
    def goal(self) -> float:
        """Of the event."""
        return self.sparsities[-1] if self.sparsities else 0.0


def goal_of(trainer: pl.Trainer, schedule: SparsitySchedule, run: Run, epoch: int) -> float | None:
    """The goal of an event that has come, the same on every rank; None, with a message, where a schedule finds nothing to prune.

    Raises:
        GradientError: The schedule reads the weights, and they are not finite.
        ScheduleError: What it finds is no sparsity.
    """
    planned = run.events[epoch]
    if not schedule.adapts:
        return planned
    refuse_broken_weights(trainer, run.targets)
    goal: float | None = distributed.gather_objects(schedule.adapted(planned, run.targets.weights(), run.masks))[0]
    if goal is None:
        reached = run.masks.global_sparsity
        rank_zero_info(f"Epoch {epoch}: the schedule finds nothing to prune beyond {reached:.2%}; a new cycle begins.")
    else:
        require_real("schedule.adapted()", goal, "[0, 1)", example=planned, error=ScheduleError)
    return goal


def plan_steps(
    pruner: Pruner,
    schedule: SparsitySchedule,
    targets: Targets,
    masks: MaskSet,
    goal: float,
    epoch: int,
    num_recomputations: int,
    path: StepPath = "exponential",
) -> PruningSteps | None:
    """The steps to ``goal``; None, with a warning, if it is below what is reached, and neither schedule nor pruner regrows.

    Args:
        pruner: The pruner of the run.
        schedule: The schedule of the run.
        targets: The weights.
        masks: The masks in force.
        goal: Sparsity to reach at the event, or share to save of what else the pruner's cost counts.
        epoch: Epoch of the event.
        num_recomputations: Steps that a pruner takes to a higher sparsity.
        path: How they lead there; see `steps_to`.
    """
    start = pruner.reached(targets, masks)
    steps = _steps(pruner, schedule, targets, masks, start, goal, num_recomputations, path)
    if steps is None:
        rank_zero_warn(
            f"schedule: {pruner.cost.name} {goal:g} at epoch {epoch}, but the model is already at {start:.4g}. Nothing is changed; "
            "pruned weights grow back only where the schedule declares it, as SparsitySteps(..., allow_decrease=True) does."
        )
    return steps


def validate_steps(
    pruner: Pruner,
    schedule: SparsitySchedule,
    targets: Targets,
    masks: MaskSet,
    goals: Iterable[float],
    num_recomputations: int,
    path: StepPath = "exponential",
) -> None:
    """Refuse, before the first step, what an event to come could not do. Arguments as for `plan_steps`.

    Args:
        pruner: The pruner of the run.
        schedule: The schedule of the run.
        targets: The weights.
        masks: In force now. Until all are lifted, they stand for those of the events to come.
        goals: Those of the events that are not done yet, in order.
        num_recomputations: Steps that a pruner takes to a higher sparsity.
        path: How they lead there; see `steps_to`.

    Raises:
        ConfigError: The zeros of an event, or of a step to it, cannot be placed.
        PatternError: The sparsity falls, and weights that come back one by one would break the pruner's pattern.
    """
    present = dict(masks)
    for steps in steps_to_come(pruner, schedule, targets, masks, goals, num_recomputations, path):
        if steps is None:
            continue
        if not steps.sparsities:
            present = {}
        steps.pruner.check_goals(targets, present, steps.sparsities)


def steps_to_come(
    pruner: Pruner,
    schedule: SparsitySchedule,
    targets: Targets,
    masks: MaskSet,
    goals: Iterable[float],
    num_recomputations: int,
    path: StepPath = "exponential",
) -> Iterator[PruningSteps | None]:
    """Those of each event to come, None for one that changes nothing. Arguments and errors as for `validate_steps`."""
    start = pruner.reached(targets, masks)
    for goal in goals:
        steps = _steps(pruner, schedule, targets, masks, start, goal, num_recomputations, path)
        start = start if steps is None else goal
        yield steps


def _steps(
    pruner: Pruner,
    schedule: SparsitySchedule,
    targets: Targets,
    masks: MaskSet,
    start: float,
    goal: float,
    num_recomputations: int,
    path: StepPath = "exponential",
) -> PruningSteps | None:
    """From the share ``start`` that is saved to ``goal``; None if there are none."""
    if schedule.regrows and goal == 0:
        return PruningSteps(pruner, ())
    if pruner.regrows:
        return PruningSteps(pruner, (goal,))
    if pruner.pattern.sparsity is None and _is_exceeded(pruner, targets, masks, start, goal):
        if schedule.regrows:
            _refuse_patterned_fall(pruner, start, goal)
            return PruningSteps(grower(pruner), (goal,))
        return None
    return PruningSteps(pruner, tuple(steps_to(goal, start, num_recomputations, path)))


def _is_exceeded(pruner: Pruner, targets: Targets, masks: MaskSet, start: float, goal: float) -> bool:
    if pruner.takes_units:  # whose goals never fall
        return pruner.exceeds(goal, targets, masks)
    total = pruner.cost.total(targets.shapes)
    return pruner.cost.is_exceeded(goal, round(start * total), total)


def grower(pruner: Pruner) -> DropAndGrow:
    """Brings weights back by their mean gradient, as many in each budget as the allocation of ``pruner`` has it.

    It drops none where that does not ask for it, and takes as many gradient samples as ``pruner``, if any.
    """
    given = pruner.statistic
    if not isinstance(given, GradientSamples):
        return DropAndGrow(drop_fraction=0, allocation=pruner.allocation)
    counts = {"num_gradients": given.n, "samples_per_gradient": given.per_sample}
    return DropAndGrow(drop_fraction=0, allocation=pruner.allocation, **counts)


def _refuse_patterned_fall(pruner: Pruner, start: float, goal: float) -> None:
    if not isinstance(pruner.pattern, Unstructured):
        raise PatternError(
            f"pattern={pruner.pattern}: the sparsity falls from {start:.4g} to {goal:g}, and weights come back one by one, "
            "which would break the pattern. Let the schedule rise, or fall to 0 first, which lifts all masks, or use "
            "Unstructured()."
        )


def pruners_of(pruner: Pruner, schedule: SparsitySchedule, events: Mapping[int, float]) -> list[Pruner]:
    """The pruners that a run needs, its own first."""
    reached, falls = 0.0, False
    for goal in events.values():
        falls |= 0 < goal < reached
        reached = goal
    return [pruner, grower(pruner)] if falls and schedule.regrows and not pruner.regrows else [pruner]
