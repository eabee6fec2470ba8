"""First-order pruning of units: the saliency of a unit from the gradient of the loss by its gate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.calibration.unit_samples import UnitSamples
from lightning_cap.pruners.unit_scores import ScoredUnits, mean_over_gates
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import units_of
from lightning_cap.utilities.arguments import require_counts


@dataclass(kw_only=True, eq=False)
class TaylorUnits(ScoredUnits):
    """Remove the units of least ``Σ_k |g_k| / N``, with the gradient ``g = Σ_i w_i ∂L/∂w_i`` of a gate on the unit's output.

    To first order, what the loss of a sample changes by when the unit is removed (Molchanov et al. 2017, 2019; Michel et al. 2019
    for heads). Kept weights are not changed.

    Args:
        num_gradients: Gradient samples, ``N``.
        samples_per_gradient: Inputs whose mean loss gives one gradient sample.
        normalize: See `ScoredUnits`.
        cost: What a goal counts. See `UnitPruner`.
        allocation: How units are shared out over the groups. See `UnitPruner`.

    Raises:
        ConfigError: An argument is out of range.
    """

    num_gradients: int = 1024
    samples_per_gradient: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(num_gradients=self.num_gradients, samples_per_gradient=self.samples_per_gradient)

    @property
    def statistic(self) -> UnitSamples:
        """Gradients of gates."""
        return UnitSamples(self.num_gradients, self.samples_per_gradient)

    def _saliency(self, targets: Targets, gradients: GradientSource) -> dict[str, Tensor]:
        return mean_over_gates(targets, units_of(targets), gradients, lambda rows: rows.abs().sum(0))[0]
