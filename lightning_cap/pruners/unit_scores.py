"""Methods that give every unit one saliency and prune those of least saliency: what they have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource, check_any_rows, check_rows, reading
from lightning_cap.pruners.unit_merge import UnitOrder
from lightning_cap.pruners.unit_path import UnitSolution
from lightning_cap.pruners.units import UnitPruner
from lightning_cap.pruners.zero_gradients import check_zeros
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import Units
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_choice
from lightning_cap.utilities.progress import Progress

Normalize = Literal["none", "mean", "sum"]


@dataclass(kw_only=True, eq=False)
class ScoredUnits(UnitPruner):
    """Base of methods with one saliency per unit; subclasses say in `_saliency` what it is. Kept weights are not changed.

    Args:
        normalize: How units of different groups are compared: ``"none"`` by their saliency per price that they save, ``"mean"`` by
            their saliency over the mean of their group, whatever they save, ``"sum"`` over the sum of their group.
        cost: What a goal counts. See `UnitPruner`.
        allocation: How units are shared out over the groups. See `UnitPruner`.

    Raises:
        ConfigError: An argument is something else.
    """

    normalize: Normalize = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("normalize", self.normalize, get_args(Normalize))

    @property
    def by_price(self) -> bool:
        """See `UnitPruner`."""
        return self.normalize == "none"

    @abstractmethod
    def _saliency(self, targets: Targets, gradients: GradientSource) -> Mapping[str, Tensor]:
        """``{group: (size)}``: what it costs to remove each unit. Those below 0 are removed first."""

    def _solve(
        self,
        targets: Targets,
        masks: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        gradients: GradientSource,
        progress: Progress | None,
    ) -> UnitSolution:
        orders = by_saliency(self._saliency(targets, gradients), kept)
        if self.normalize == "none":
            return UnitSolution(orders)
        totals = {name: float(order.losses.abs().sum()) for name, order in orders.items()}
        if self.normalize == "mean":
            totals = {name: total / max(1, len(orders[name].losses)) for name, total in totals.items()}
        return UnitSolution({n: UnitOrder(o.units, o.losses / (totals[n] or 1.0)) for n, o in orders.items()})


def by_saliency(saliencies: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, UnitOrder]:
    """The orders by one saliency ``(size,)`` for each unit, least first."""
    orders = {}
    for name, units in kept.items():
        alive = units.nonzero().flatten()
        values = saliencies[name].double().cpu()[alive]
        places = values.argsort(stable=True)
        orders[name] = UnitOrder(alive[places], values[places])
    return orders


def mean_over_gates(
    targets: Targets,
    units: Units,
    gradients: GradientSource,
    statistic: Callable[[Tensor], Tensor],
    unit: str = "gradients",
) -> tuple[dict[str, Tensor], int]:
    """Mean of a statistic of gate gradients over all rows of all processes. Every process must call it.

    Args:
        targets: Say on which device to work.
        units: The groups.
        gradients: Chunks ``{group: (n, size)}``; read once.
        statistic: ``(n, size)`` float64 rows of a group -> their sum of something.
        unit: What the rows are; see `check_zeros`.

    Returns:
        ``{group: sum over rows, divided by their number}`` float64 on the CPU, and the number of rows.

    Raises:
        GradientError: There is no row, all are zero, or those of a group are missing or of another shape.
    """
    sums: dict[str, Tensor] = {}
    count, shapes = 0, {name: (size,) for name, size in units.sizes.items()}
    with reading(gradients) as chunks:
        for chunk in chunks:
            check_rows(chunk, shapes, units)
            for name in units:
                found = statistic(chunk[name].to(targets.device, torch.float64))
                sums[name] = sums[name] + found if name in sums else found
            count += next(iter(chunk.values())).shape[0]
            del chunk
    total = distributed.gather_counts(count, targets.device)
    check_any_rows(total)
    if not sums:  # this process has had no chunk
        sums = {
            name: statistic(torch.zeros(0, *shape, device=targets.device).double()) for name, shape in shapes.items()
        }
    means = {name: (distributed.sum_over_ranks(sums[name]) / sum(total)).cpu() for name in units}
    check_zeros({name: bool(mean.any()) for name, mean in means.items()}, sum(total), unit)
    return means, sum(total)
