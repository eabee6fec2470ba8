"""Optimal Brain Damage: the diagonal of the empirical Fisher."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.errors import ConfigError
from lightning_cap.pruners.scored import Scored, Sums, check_counts
from lightning_cap.sparsity.allocation import Allocation
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.patterns import Pattern
from lightning_cap.sparsity.targets import Targets


class DiagonalFisher(Scored):
    """Remove the weights of least ``½ w² (damp + Σ_k g_k² / N)`` (OBD, LeCun et al. 1989; "WF-1" in the paper).

    Equation 2 with a Fisher of blocks of one weight. There is nothing to update without correlations.

    Args:
        num_gradients: Gradient samples, ``N``.
        samples_per_gradient: Inputs whose mean loss gives one gradient sample ``g_k``.
        damp: ``λ`` of equation 3; large values lead over to magnitude.
        allocation: See `Scored`.
        pattern: See `Scored`.

    Raises:
        ConfigError: A number is out of range.
    """

    predicts_loss = True

    def __init__(
        self,
        num_gradients: int = 4096,
        samples_per_gradient: int = 1,
        damp: float = 1e-8,
        allocation: Allocation | None = None,
        pattern: Pattern | int | str | None = None,
    ) -> None:
        super().__init__(allocation, pattern)
        check_counts(num_gradients, samples_per_gradient)
        if not 0 <= damp < float("inf"):
            raise ConfigError(f"damp={damp}: give a finite number of at least 0, such as 1e-8.")
        self.num_gradients, self.samples_per_gradient, self.damp = num_gradients, samples_per_gradient, damp

    def _saliency(
        self, targets: Targets, layout: BlockLayout, weights: Tensor, gradients: GradientSource
    ) -> Mapping[str, Tensor]:
        means = Sums(targets, gradients).of(lambda rows: rows.square())
        return {name: (mean + self.damp) * targets[name].detach().double().square() / 2 for name, mean in means.items()}
