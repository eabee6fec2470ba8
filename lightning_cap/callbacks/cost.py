"""What the goals of a run count."""

from __future__ import annotations

import copy
import dataclasses

from lightning_cap.pruners import Pruner
from lightning_cap.sparsity.cost import Cost
from lightning_cap.utilities.arguments import require_instance


def with_cost(pruner: Pruner, cost: Cost | None) -> Pruner:
    """A pruner whose goals count ``cost``; None for what they count already.

    Raises:
        ConfigError: ``cost`` is none.
        UnsupportedError: Zeros, or units, save nothing of it.
    """
    require_instance("cost", cost, Cost, "Flops()", optional=True)
    if cost is None:
        return pruner
    if pruner.takes_units and dataclasses.is_dataclass(pruner):
        return dataclasses.replace(pruner, cost=cost)
    if not pruner.takes_units:
        cost.prices({})
    changed = copy.copy(pruner)
    changed.cost = cost
    return changed
