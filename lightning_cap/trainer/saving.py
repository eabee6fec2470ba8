"""What the goals of a pruner count, by name, and how much of it is saved."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_cap.pruners import Pruner
from lightning_cap.sparsity.cost import Parameters
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.records import Saving


def goal_name(pruner: Pruner) -> str:
    """What a pruner's goals count, as it is called in logs and names of files: such as ``"sparsity"`` or ``"flops"``.

    Units that are a share of the weights are not called a sparsity: in the same run, zeros among what is left may be.
    """
    return "parameters" if pruner.takes_units and isinstance(pruner.cost, Parameters) else pruner.cost.name


def saving(pruner: Pruner, targets: Targets, masks: Mapping[str, Tensor]) -> Saving | None:
    """What masks save of that; None of zeros, which every record has.

    Args:
        pruner: Whose goals they are.
        targets: The weights.
        masks: Of all of them.
    """
    if targets.units is None or not pruner.takes_units:
        return None
    prices = pruner.cost.unit_prices(targets.units, targets.shapes)
    kept = {name: int(units.sum()) for name, units in targets.units.kept(masks).items()}
    return Saving(goal_name(pruner), prices.saved_share(kept), prices.of(kept), prices.unit or "weights")
