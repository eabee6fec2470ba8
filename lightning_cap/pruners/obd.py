"""Optimal Brain Damage: the diagonal of the empirical Fisher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.calibration.statistics import GradientSamples
from lightning_cap.pruners.row_mean import RowMean
from lightning_cap.pruners.scored import Scored
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.arguments import require_counts, require_real


@dataclass(kw_only=True, eq=False)
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

    num_gradients: int = 4096
    samples_per_gradient: int = 1
    damp: float = 1e-8

    predicts_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(num_gradients=self.num_gradients, samples_per_gradient=self.samples_per_gradient)
        require_real("damp", self.damp, "[0, inf)", example=1e-8)

    @property
    def statistic(self) -> GradientSamples:
        """Gradient rows."""
        return GradientSamples(self.num_gradients, self.samples_per_gradient)

    def _saliency(
        self, targets: Targets, layout: BlockLayout, weights: Tensor, gradients: GradientSource
    ) -> Mapping[str, Tensor]:
        means = RowMean(torch.square).over(targets, gradients)
        return {name: (mean + self.damp) * targets[name].detach().double().square() / 2 for name, mean in means.items()}
