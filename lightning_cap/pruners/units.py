"""Pruners of units: what they have in common. Each says in which order the units of a group go, and what becomes of the others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_cap.calibration.sources import NO_MEMORY, GradientSource, SourceMemory
from lightning_cap.errors import ConfigError, GradientError
from lightning_cap.fisher.memory_plan import MemoryPlan, plan_reading
from lightning_cap.pruners.base import Pruner, check_path_arguments, require_goals
from lightning_cap.pruners.paths import check_finite
from lightning_cap.pruners.unit_merge import Merge, floors_of, reaches
from lightning_cap.pruners.unit_path import UnitPath, UnitSolution, counts, exceeds
from lightning_cap.sparsity.allocation import Allocation, Global, Uniform
from lightning_cap.sparsity.cost import Cost, Parameters
from lightning_cap.sparsity.masks import check_masks
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.sparsity.unit_prices import UnitPrices
from lightning_cap.sparsity.units import Units, units_of
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_instance, require_real
from lightning_cap.utilities.progress import Progress


@dataclass(kw_only=True, eq=False)
class UnitPruner(Pruner):
    """Base of methods that prune units: heads, neurons, channels. Its targets are those of `Units.targets`.

    A goal is a share of the cost that is to be saved, reached with as few units as the order of the method needs: exactly to one
    unit. Every group keeps one unit at least.

    Args:
        cost: What a goal counts: weights (`Parameters`), FLOPs (`Flops`) or milliseconds (`Latency`) of the model.
        allocation: `Global`, where units of all groups compete, or `Uniform`, where all groups keep about the same share. A
            ``min_density`` is the share of its units that each group keeps at least.

    Raises:
        ConfigError: One is something else.
    """

    cost: Cost = field(default_factory=Parameters)
    allocation: Allocation = Global()

    takes_units: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_instance("cost", self.cost, Cost, "Flops()")
        require_instance("allocation", self.allocation, (Global, Uniform), "Uniform()")

    def check(self, targets: Targets) -> None:
        """Refuse targets that are no units, and a cost that has no price for them."""
        self.prices(targets)

    def prices(self, targets: Targets) -> UnitPrices:
        """What the units of ``targets`` cost.

        Raises:
            TargetError: They are of none.
            UnsupportedError: ``cost`` prices weights alone.
        """
        return self.cost.unit_prices(units_of(targets), targets.shapes)

    def check_goals(self, targets: Targets, masks: Mapping[str, Tensor] | None, sparsities: Sequence[float]) -> None:
        """Refuse goals that cannot be reached even with the fewest units. See `Pruner.check_goals`."""
        require_goals(targets, masks, sparsities)
        prices, kept = self.prices(targets), alive_units(units_of(targets), masks)
        floors = floors_of(units_of(targets).sizes, self.allocation.min_density, counts(kept))
        most = prices.saved_share(floors)
        for goal in sparsities:
            if not reaches(most, goal):
                raise ConfigError(self._beyond(goal, most, prices))

    def _beyond(self, goal: float, most: float, prices: UnitPrices) -> str:
        floor = f"min_density={self.allocation.min_density:g}" if self.allocation.min_density else "one unit per group"
        left = f"{prices.total * (1 - most):.6g}{f' {prices.unit}' if prices.unit else ''}"
        return (
            f"{self.cost.name}={goal:g}: even with {floor} the model costs {left} of {prices.total:.6g}, so {most:.4g} at most "
            "can be saved. Ask for less, or let more layers be pruned."
        )

    def reached(self, targets: Targets, masks: Mapping[str, Tensor] | None) -> float:
        """The share of its cost that pruned units save already. See `Pruner.reached`."""
        check_masks(targets, masks)
        return self.prices(targets).saved_share(counts(alive_units(units_of(targets), masks)))

    def exceeds(self, goal: float, targets: Targets, masks: Mapping[str, Tensor] | None) -> bool:
        """Whether more is saved than ``goal`` asks for, by more than any one unit saves. See `Pruner.exceeds`."""
        require_real("goal", goal, "[0, 1]", example=0.5)
        check_masks(targets, masks)
        return exceeds(self.prices(targets), counts(alive_units(units_of(targets), masks)), goal)

    def plan(
        self, targets: Targets, masks: Mapping[str, Tensor] | None = None, *, source: SourceMemory = NO_MEMORY
    ) -> MemoryPlan:
        """The squares of all groups, in float64, and copies of the weights. See `Pruner.plan`."""
        require_targets(targets)
        check_masks(targets, masks)
        squares = sum(size**2 for size in units_of(targets).sizes.values())
        products = 4 * max(weight.numel() for weight in targets.values())
        held, solving = 8 * squares, 24 * squares + 24 * targets.numel + 2 * self.held_bytes(targets)
        return plan_reading(targets.device, source, held, products, solving)

    def path(
        self,
        targets: Targets,
        gradients: GradientSource = (),
        masks: Mapping[str, Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> UnitPath:
        """Order the units of every group, and merge the orders."""
        check_path_arguments(targets, gradients, progress)
        check_masks(targets, masks)
        check_finite(targets.weights())
        units = units_of(targets)
        kept = alive_units(units, masks)
        solution = self._solve(targets, masks or {}, kept, gradients, progress)
        orders = solution.orders
        for name, order in orders.items():
            if not bool(torch.isfinite(order.losses).all()):
                raise GradientError(f"gradients: a loss of the units of {name!r} is not finite. Scale the loss down.")
        prices = self.prices(targets)
        floors = floors_of(units.sizes, self.allocation.min_density, counts(kept))
        uniform = isinstance(self.allocation, Uniform)
        removals = Merge(orders, prices, units.sizes, floors, uniform, self.by_price).run()
        removals = distributed.gather_objects(removals)[0] if distributed.world_size() > 1 else removals
        return UnitPath(self, targets, masks or {}, kept, prices, removals, solution)

    def held_bytes(self, targets: Targets) -> int:
        """What the method keeps besides the squares of groups."""
        return 0

    @property
    def by_price(self) -> bool:
        """Whether units of different groups are compared by their losses per price that they save."""
        return True

    @abstractmethod
    def _solve(
        self,
        targets: Targets,
        masks: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        gradients: GradientSource,
        progress: Progress | None,
    ) -> UnitSolution:
        """The order of every group.

        Args:
            targets: All weights of units.
            masks: Weights that are pruned already.
            kept: ``{group: bool (size)}`` on the CPU, units that are there.
            gradients: What `statistic` says.
            progress: See `path`.
        """


def alive_units(units: Units, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Units that are not masked as a whole, ``{group: bool (size)}`` on the CPU. Single zeros, of another pruner, do not count."""
    given = masks or {}
    alive = {}
    for name, group in units.items():
        left = torch.zeros(group.size, dtype=torch.bool)
        for part in group.slices:
            if part.name not in given:
                left[:] = True
                break
            mask = given[part.name].cpu()
            other = [dim for dim in range(mask.dim()) if dim != part.dim]
            lines = mask.any(dim=other) if other else mask
            left |= lines[part.index.cpu()].any(1)
        alive[name] = left
    return alive
