"""First-order methods: the saliency of a weight from the gradient of the loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.pruners.scored import Scored, Sums, check_counts
from lightning_cap.sparsity.allocation import Allocation
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.patterns import Pattern
from lightning_cap.sparsity.targets import Targets


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

    def __init__(
        self,
        num_gradients: int = 4096,
        samples_per_gradient: int = 1,
        allocation: Allocation | None = None,
        pattern: Pattern | int | str | None = None,
    ) -> None:
        super().__init__(allocation, pattern)
        check_counts(num_gradients, samples_per_gradient)
        self.num_gradients, self.samples_per_gradient = num_gradients, samples_per_gradient

    def _saliency(
        self, targets: Targets, layout: BlockLayout, weights: Tensor, gradients: GradientSource
    ) -> Mapping[str, Tensor]:
        means = Sums(targets, gradients).of(lambda rows: rows.abs())
        return {name: mean * targets[name].detach().abs() for name, mean in means.items()}


class Taylor(GradientTimesWeight):
    """Remove the weights for which the loss rises least to first order, ``-w ḡ`` with the mean gradient ``ḡ``.

    The change of the loss when a weight is set to zero alone, signed: weights whose removal promises a lower loss go first,
    and the predicted loss may be negative (Molchanov et al. 2017, without the absolute value; movement pruning's score at
    one point in time, Sanh et al. 2020). Arguments: see `GradientTimesWeight`.
    """

    predicts_loss = True

    def _saliency(
        self, targets: Targets, layout: BlockLayout, weights: Tensor, gradients: GradientSource
    ) -> Mapping[str, Tensor]:
        means = Sums(targets, gradients).of(lambda rows: rows)
        return {name: -mean * targets[name].detach() for name, mean in means.items()}
