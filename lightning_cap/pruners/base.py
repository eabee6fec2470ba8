"""`Pruner`: what every pruning method is.

Annotations are evaluated here, not postponed: jsonargparse resolves those of a subclass in the subclass's own module.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor

from lightning_cap.calibration.sources import NO_MEMORY, GradientSource, SourceMemory, limit_rows, memory_of
from lightning_cap.calibration.statistics import Statistic
from lightning_cap.errors import ConfigError, GradientError, PatternError, UnsupportedError
from lightning_cap.fisher.memory_plan import MemoryPlan, plan_reading
from lightning_cap.healing import Heal, HealArgument, as_heal
from lightning_cap.pruners.paths import PruningPath
from lightning_cap.sparsity.allocation import Allocation, Global
from lightning_cap.sparsity.cost import MOST_STEPS, Cost, Parameters
from lightning_cap.sparsity.masks import check_masks, count_masked
from lightning_cap.sparsity.patterns import Pattern, Unstructured
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities.arguments import (
    require_callable,
    require_instance,
    require_iterable,
    require_list,
    require_real,
    require_whole,
    shown,
)
from lightning_cap.utilities.progress import Progress


class Pruner(ABC):
    """A pruning method. YAML names subclasses by class path; those of this package are keyword-only dataclasses.

    Attributes:
        allocation: How zeros are shared out over the targets.
        pattern: Which masks it gives.
        cost: What a goal counts.
        heal: What moves the kept weights after pruning: a `Heal`, ``"layerwise"``, ``"distill"``, or None for nothing.
        takes_units: Whether it prunes units: its targets are those of `Units.targets`.
        predicts_loss: Whether the sum of its saliencies is an estimate of the increase of the training loss, in its unit. Of
            others nothing is called a predicted loss.
        regrows: Whether masked weights may come back: the masks of its results stand in place of those before, a weight that
            comes back is zero in the result, and events are run at a sparsity that is reached already, too.
    """

    allocation: Allocation = Global()
    pattern: Pattern = Unstructured()
    cost: Cost = Parameters()
    heal: HealArgument = None
    takes_units: ClassVar[bool] = False
    predicts_loss: ClassVar[bool] = False
    regrows: ClassVar[bool] = False

    @property
    def takes_shards(self) -> bool:
        """Whether it prunes targets that are shared out over processes (FSDP2)."""
        return False

    @property
    def statistic(self) -> Statistic | None:
        """What the method reads of the model, such as `GradientSamples` or `LayerInputs`; None for nothing."""
        return None

    def check(self, targets: Targets) -> None:  # noqa: B027 - optional
        """Refuse targets that do not fit, before anything runs.

        Raises:
            TargetError: A target does not fit the method or its pattern.
        """

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse a sparsity that the method cannot give, before anything runs.

        Raises:
            PatternError: ``sparsity`` is not in [0, 1) or not the pattern's own.
        """
        Unstructured().check_sparsity(sparsity)

    def check_goals(self, targets: Targets, masks: Mapping[str, Tensor] | None, sparsities: Sequence[float]) -> None:
        """Refuse sparsities whose zeros the allocation cannot place, before anything runs.

        Zeros that a run will have made by then are not known; those of ``masks`` stand for them.

        Args:
            targets: The weights.
            masks: As for `path`.
            sparsities: All that the run is to reach, those between two events included. Those that ``masks`` are beyond
                are passed over: they change nothing.

        Raises:
            ConfigError: The zeros of one cannot be placed; it is named.
        """
        require_goals(targets, masks, sparsities)
        if self.pattern.sparsity is not None:
            return
        existing = dict.fromkeys(targets, 0) | count_masked(masks or {})
        saved, total = self.cost.saved(targets.shapes, existing), self.cost.total(targets.shapes)
        goals = [s for s in sparsities if not self.cost.is_exceeded(s, saved, total)]
        check_room(self, targets, existing, goals)

    def reached(self, targets: Targets, masks: Mapping[str, Tensor] | None) -> float:
        """The share of its cost that masks save already: what a goal is to be above.

        Args:
            targets: The weights.
            masks: As for `path`; targets without one are whole.
        """
        require_targets(targets)
        check_masks(targets, masks)
        zeros = dict.fromkeys(targets, 0) | count_masked(masks or {})
        total = self.cost.total(targets.shapes)
        return 1 - (total - self.cost.saved(targets.shapes, zeros)) / total

    def exceeds(self, goal: float, targets: Targets, masks: Mapping[str, Tensor] | None) -> bool:
        """Whether masks save more than ``goal`` asks for, so that there is nothing left to prune.

        Args:
            goal: Share of the cost.
            targets: The weights.
            masks: As for `path`.
        """
        total = self.cost.total(targets.shapes)
        return self.cost.is_exceeded(goal, round(self.reached(targets, masks) * total), total)

    def begin_event(self, done: float) -> None:
        """Take note of how far the run is, before each event of a callback.

        Args:
            done: Events of the run that are done, over all of them: 0 at the first one, below 1.

        Raises:
            ConfigError: It is no number in [0, 1].
        """
        require_real("done", done, "[0, 1]", example=0.0)

    def plan(
        self, targets: Targets, masks: Mapping[str, Tensor] | None = None, *, source: SourceMemory = NO_MEMORY
    ) -> MemoryPlan:
        """What `path` will take, and how it will go about it. Every process must call it.

        Args:
            targets: The weights.
            masks: As for `path`.
            source: What reading the gradients takes.

        Raises:
            ConfigError: It cannot fit.
        """
        require_targets(targets)
        check_masks(targets, masks)
        return plan_reading(targets.device, source, 0, 0)

    def state_dict(self) -> dict[str, Any]:
        """Settings that a resumed run must go on with, as plain values; kept in checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the settings of a checkpoint.

        Raises:
            ConfigError: It holds something else.
        """
        require_instance("state", state, Mapping, "that of a checkpoint")

    @abstractmethod
    def path(
        self,
        targets: Targets,
        gradients: GradientSource,
        masks: Mapping[str, Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> PruningPath:
        """Read the gradients and order the weights.

        Args:
            targets: The weights; not changed.
            gradients: Chunks of what `statistic` says, such as ``{target: (n, *shape)}`` gradient rows; not read if that is None.
            masks: ``{target: (*shape)}`` bool, False = already pruned and to stay so.
            progress: ``progress(phase, done, total)``.
        """

    def __repr__(self) -> str:
        settings: dict[str, Any] = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def prepare(
    pruner: Pruner, targets: Targets, masks: Mapping[str, Tensor] | None, source: GradientSource | None
) -> MemoryPlan:
    """Plan what `Pruner.path` will take with ``source``, and let that compute as few rows at once as the plan says.

    Every process must call it. The first batch is tried for it, if none was.
    """
    refuse_shards(pruner, targets)
    plan = pruner.plan(targets, masks, source=memory_of(source))
    limit_rows(source, plan.rows)
    return plan


def refuse_shards(pruner: Pruner, targets: Targets, recalibrate: bool = False) -> None:
    """Refuse, for sharded targets, what would need whole weights.

    Raises:
        UnsupportedError: The pruner does, or what follows it.
    """
    if not targets.is_sharded:
        return
    way_out = "Use CAP, WoodFisher or Magnitude, or train with strategy='ddp'."
    if not pruner.takes_shards:
        raise UnsupportedError(
            f"pruner={type(pruner).__name__}: with these settings it cannot prune sharded weights (FSDP2). {way_out} Of CAP, "
            "ranking='auto' needs whole weights; of Magnitude, a pattern of whole groups."
        )
    if pruner.heal is not None:
        raise UnsupportedError(
            f"heal={shown(pruner.heal)}: sharded weights (FSDP2) cannot be healed. Leave heal out, or use strategy='ddp'."
        )
    if recalibrate:
        raise UnsupportedError(
            "recalibrate=True: batch norm of sharded models (FSDP2) cannot be estimated anew. Leave it out, or use strategy='ddp'."
        )


def refuse_regrowth(pruner: Pruner) -> None:
    """Refuse, for one-shot pruning, a pruner that brings weights back.

    Raises:
        UnsupportedError: It does.
    """
    if pruner.regrows:
        raise UnsupportedError(
            f"pruner={type(pruner).__name__}: weights that it brings back are zero until training goes on, and one-shot pruning "
            "does not train. Run it by CAPPruningCallback, or use Magnitude."
        )


def heal_of(pruner: Pruner) -> Heal | None:
    """What heals after a pruner.

    Raises:
        ConfigError: Its ``heal`` is nothing of the kind, or it prunes units or brings weights back.
    """
    heal = as_heal(pruner.heal)
    if heal is not None and (pruner.takes_units or pruner.regrows):
        why = "prunes units, whose kept weights it moves itself" if pruner.takes_units else "brings weights back"
        raise ConfigError(
            f"heal={shown(pruner.heal)}: {type(pruner).__name__} {why}, so it cannot be healed. Leave heal out, or use CAP or "
            "another pruner of weights."
        )
    return heal


def with_heal(pruner: Pruner, heal: HealArgument) -> Pruner:
    """A pruner that is healed by ``heal``; the same for None, which leaves it to the pruner.

    Raises:
        ConfigError: ``heal`` is nothing of the kind, or the pruner cannot be healed.
    """
    chosen = as_heal(heal)
    if chosen is not None:
        pruner = copy.copy(pruner)
        pruner.heal = chosen
    heal_of(pruner)
    return pruner


def refuse_splitting(pruner: Pruner, num_recomputations: int) -> None:
    """Refuse several steps to a pattern that has only one sparsity.

    Raises:
        ConfigError: ``num_recomputations`` is above 1, or no whole number from 1 to 10,000.
    """
    require_whole("num_recomputations", num_recomputations, at_most=MOST_STEPS, example=4)
    if num_recomputations > 1 and pruner.pattern.sparsity is not None:
        raise ConfigError(
            f"num_recomputations={num_recomputations}: {pruner.pattern} has only one sparsity, so the way to it cannot be "
            "split. Leave num_recomputations at 1."
        )


def check_room(pruner: Pruner, targets: Targets, existing: Mapping[str, int], sparsities: Sequence[float]) -> None:
    """Refuse sparsities that a pruner's allocation cannot give; ``existing`` zeros of each target stay.

    Raises:
        ConfigError: It names the sparsity.
    """
    total = pruner.cost.total(targets.shapes)
    for sparsity in sparsities:
        try:
            pruner.allocation.budgets(targets.shapes, existing, pruner.cost.budget(sparsity, total))
        except ConfigError as error:
            raise ConfigError(f"sparsity={sparsity:g}: {error}") from error


def require_allocation(allocation: object) -> None:
    """Refuse what is no allocation.

    Raises:
        ConfigError: It is a name, a class or something else.
    """
    require_instance("allocation", allocation, Allocation, "ERK()")


def require_goals(targets: object, masks: object, sparsities: object) -> None:
    """Refuse what is no `Targets`, no masks of theirs, or no list of sparsities.

    Raises:
        ConfigError: One is something else; it is named.
    """
    require_targets(targets)
    check_masks(cast(Targets, targets), masks)
    require_list("sparsities", sparsities, "[0.5, 0.75]")
    for sparsity in cast("Sequence[float]", sparsities):
        Unstructured().check_sparsity(sparsity)


def check_path_arguments(targets: object, gradients: object, progress: object) -> None:
    """Refuse what `Pruner.path` cannot work on; masks and rows are checked where they are read.

    Raises:
        ConfigError: ``targets`` or ``progress`` is something else.
        GradientError: ``gradients`` cannot be gone through.
    """
    require_targets(targets)
    require_iterable("gradients", gradients, "[{target name: (n, *weight.shape)}]", error=GradientError)
    require_callable("progress", progress, "progress(phase, done, total)", optional=True, num_arguments=3)


def in_blocks(pattern: Pattern, method: str) -> Pattern:
    """``pattern`` itself, for a method that works inside blocks of consecutive weights.

    Raises:
        PatternError: Blocks cannot enforce it.
    """
    if not pattern.in_blocks:
        raise PatternError(
            f"pattern={pattern}: {method} works inside blocks of consecutive weights, which do not hold whole rows. Use "
            "DiagonalFisher, GradientTimesWeight, Taylor, Magnitude or Random with it."
        )
    return pattern
