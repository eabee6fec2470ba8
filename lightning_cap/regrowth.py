"""How pruned weights come back: which way an event takes, and what the optimizer knows of a weight that is new."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_cap.allocation import budget_of
from lightning_cap.errors import PatternError
from lightning_cap.masks import MaskSet
from lightning_cap.patterns import Unstructured
from lightning_cap.pruners import DropAndGrow, Pruner
from lightning_cap.schedules import SparsitySchedule
from lightning_cap.targets import Targets


@dataclass(frozen=True)
class Way:
    """From the sparsity that is reached to an event's target.

    Attributes:
        pruner: Who goes it.
        sparsities: Its steps; none lifts all masks.
        anew: It begins a sparse phase: momentum of the dense one is stale.
    """

    pruner: Pruner
    sparsities: tuple[float, ...]
    anew: bool = False


def choose_way(
    pruner: Pruner, schedule: SparsitySchedule, masks: MaskSet, target: float, epoch: int, num_recomputations: int
) -> Way | None:
    """The way to ``target``; None, with a warning, if it is below what is reached, and neither schedule nor pruner regrows.

    Args:
        pruner: Of the run.
        schedule: Of the run.
        masks: In force.
        target: Sparsity of the event.
        epoch: Of the event.
        num_recomputations: Steps that a pruner takes to a higher sparsity.
    """
    start, numel = masks.global_sparsity, sum(mask.numel() for mask in masks.values())
    way = _way(pruner, schedule, start, numel, target, num_recomputations)
    if way is None:
        rank_zero_warn(
            f"schedule: sparsity {target:g} at epoch {epoch}, but the model is already at {start:.4g}. Nothing is changed; "
            "pruned weights grow back only where the schedule declares it, as SparsitySteps(..., allow_decrease=True) does."
        )
    return way


def check_ways(
    pruner: Pruner,
    schedule: SparsitySchedule,
    targets: Targets,
    masks: MaskSet,
    goals: Iterable[float],
    num_recomputations: int,
) -> None:
    """Refuse, before the first step, what an event to come could not do. Arguments as for `choose_way`.

    Args:
        pruner: Of the run.
        schedule: Of the run.
        targets: The weights.
        masks: In force now. Until all are lifted, they stand for those of the events to come.
        goals: Sparsities of the events that are not done yet, in order.
        num_recomputations: Steps that a pruner takes to a higher sparsity.

    Raises:
        ConfigError: The zeros of an event, or of a step to it, cannot be placed.
        PatternError: The sparsity falls, and weights that come back one by one would break the pruner's pattern.
    """
    start, present = masks.global_sparsity, dict(masks)
    for goal in goals:
        way = _way(pruner, schedule, start, targets.numel, goal, num_recomputations)
        if way is None:
            continue
        if not way.sparsities:
            present = {}
        way.pruner.check_goals(targets, present, way.sparsities)
        start = goal


def _way(
    pruner: Pruner, schedule: SparsitySchedule, start: float, numel: int, target: float, num_recomputations: int
) -> Way | None:
    """From the sparsity ``start`` of ``numel`` weights to ``target``; None if there is no way."""
    if schedule.regrows and target == 0:
        return Way(pruner, ())
    if pruner.regrows:
        return Way(pruner, (target,))
    if pruner.pattern.sparsity is None and budget_of(target, numel) < round(start * numel):
        if schedule.regrows:
            _refuse_patterned_fall(pruner, start, target)
            return Way(grower(pruner), (target,))
        return None
    steps = [start + (target - start) * (i + 1) / num_recomputations for i in range(num_recomputations - 1)]
    return Way(pruner, (*steps, target), anew=schedule.regrows and start == 0)


def grower(pruner: Pruner) -> DropAndGrow:
    """Brings weights back by their mean gradient, as many in each budget as the allocation of ``pruner`` has it.

    It drops none where that does not ask for it, and takes as many gradient samples as ``pruner``, if any.
    """
    allocation = getattr(pruner, "allocation", None)
    if not pruner.num_gradients:
        return DropAndGrow(0, allocation=allocation)
    return DropAndGrow(0, pruner.num_gradients, pruner.samples_per_gradient, allocation)


def _refuse_patterned_fall(pruner: Pruner, start: float, target: float) -> None:
    if not isinstance(pruner.pattern, Unstructured):
        raise PatternError(
            f"pattern={pruner.pattern}: the sparsity falls from {start:.4g} to {target:g}, and weights come back one by one, "
            "which would break the pattern. Let the schedule rise, or fall to 0 first, which lifts all masks, or use "
            "Unstructured()."
        )


def pruners_of(pruner: Pruner, schedule: SparsitySchedule, events: Mapping[int, float]) -> list[Pruner]:
    """The pruners that a run needs, its own first."""
    reached, falls = 0.0, False
    for target in events.values():
        falls |= 0 < target < reached
        reached = target
    return [pruner, grower(pruner)] if falls and schedule.regrows and not pruner.regrows else [pruner]


@torch.no_grad()
def settle(
    optimizer: Optimizer, targets: Targets, masks: MaskSet, grown: Mapping[str, Tensor], *, anew: bool = False
) -> None:
    """Bring an optimizer in line with the masks after an event.

    State of masked weights is zero. A weight that came back has that of a new weight: what can be negative (first moments,
    momentum, slow copies) is zero; what cannot (second moments and the like) is the mean over the weights of the target that
    were kept. If it were zero too, late in training, when the correction of its bias is over, Adam's first steps would be
    several times the learning rate.

    Args:
        optimizer: Of the run; only state of a target's own shape is changed.
        targets: The weights.
        masks: In force now.
        grown: What came back, as `MaskSet.replace` tells it.
        anew: Set momentum and first moments of all targets to zero; second moments stay.
    """
    masks.apply_to_optimizer(optimizer)
    stayed = {name: mask & ~grown[name] if name in grown else mask for name, mask in masks.items()}
    for entries in _entries(optimizer, targets).values():
        if _is_scale(entries):
            _fill_with_means(entries, stayed, grown)
        elif anew:
            torch._foreach_zero_(list(entries.values()))
        else:
            for name in entries.keys() & grown.keys():
                entries[name].masked_fill_(grown[name].to(entries[name].device), 0.0)


def _fill_with_means(entries: Mapping[str, Tensor], stayed: Mapping[str, Tensor], grown: Mapping[str, Tensor]) -> None:
    """Where weights came back, the mean over those of their target that stayed; over all targets' if none did."""
    kept = {name: entry[stayed[name].to(entry.device)] for name, entry in entries.items()}
    for name in entries.keys() & grown.keys():
        mean = _mean([kept[name]] if kept[name].numel() else list(kept.values()))
        entries[name].masked_fill_(grown[name].to(entries[name].device), mean)


def _entries(optimizer: Optimizer, targets: Targets) -> dict[str, dict[str, Tensor]]:
    """``{key of the state: {target: (*shape)}}``."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in targets.items():
        for key, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
                found.setdefault(key, {})[name] = value
    return found


def _is_scale(entries: Mapping[str, Tensor]) -> bool:
    """Whether a kind of state is one of magnitudes, such as second moments: over all targets, none is negative."""
    return all(bool((entry >= 0).all()) for entry in entries.values())


def _mean(values: list[Tensor]) -> float:
    count = sum(value.numel() for value in values)
    return sum(float(value.sum(dtype=torch.float64)) for value in values) / count if count else 0.0
