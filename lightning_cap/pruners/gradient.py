"""First-order methods: the saliency of a weight from the gradient of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.calibration.statistics import GradientSamples
from lightning_cap.pruners.row_mean import RowMean
from lightning_cap.pruners.scored import Scored
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.arguments import require_counts


@dataclass(kw_only=True, eq=False)
class GradientTimesWeight(Scored):
    """Remove the weights of least ``Σ_k |w ⊙ g_k| / N``, equation 9 ("GrW" in the paper; after Sanh et al. 2020).

    The paper's sum is a mean here, which orders the weights alike. Kept weights are not changed.

    Args:
        num_gradients: Gradient samples, ``N``.
        samples_per_gradient: Inputs whose mean loss gives one gradient sample ``g_k``.
        allocation: See `Scored`.
        pattern: See `Scored`.

    Raises:
        ConfigError: A number is out of range.
    """

    num_gradients: int = 4096
    samples_per_gradient: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(num_gradients=self.num_gradients, samples_per_gradient=self.samples_per_gradient)

    @property
    def statistic(self) -> GradientSamples:
        """Gradient rows."""
        return GradientSamples(self.num_gradients, self.samples_per_gradient)

    def _saliency(
        self, targets: Targets, layout: BlockLayout, weights: Tensor, gradients: GradientSource
    ) -> Mapping[str, Tensor]:
        means = RowMean(torch.abs).over(targets, gradients)
        return {name: mean * targets[name].detach().abs() for name, mean in means.items()}


@dataclass(kw_only=True, eq=False)
class Taylor(GradientTimesWeight):
    """Remove the weights for which the loss rises least to first order, ``-w ḡ`` with the mean gradient ``ḡ``.

    The change of the loss when a weight is set to zero alone, signed: weights whose removal promises a lower loss are pruned first
    (Molchanov et al. 2017, without the absolute value; movement pruning's score at one point in time, Sanh et al. 2020). The sum
    over many weights may be negative, and is no prediction of the loss. Arguments: see `GradientTimesWeight`.
    """

    def _saliency(
        self, targets: Targets, layout: BlockLayout, weights: Tensor, gradients: GradientSource
    ) -> Mapping[str, Tensor]:
        means = RowMean(lambda rows: rows).over(targets, gradients)
        return {name: -mean * targets[name].detach() for name, mean in means.items()}
