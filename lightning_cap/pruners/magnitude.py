"""Magnitude pruning, the baseline: the smallest absolute weights are pruned, nothing is updated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.pruners.scored import Scored
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.patterns import as_pattern
from lightning_cap.sparsity.targets import Targets


@dataclass(kw_only=True, eq=False)
class Magnitude(Scored):
    """Remove the weights of least ``|w|`` ("GM" in the paper with the default `Global` allocation).

    Needs no gradients. The summed saliency is half the squared norm of what is removed. Arguments: see `Scored`.
    """

    @property
    def takes_shards(self) -> bool:
        """Unless groups are pruned as a whole, of which processes may hold parts."""
        return not as_pattern(self.pattern).whole_groups

    def _saliency(self, targets: Targets, layout: BlockLayout, weights: Tensor, gradients: GradientSource) -> Tensor:
        return weights.abs()

    def _summed(self, weights: Tensor) -> Tensor:
        return weights.square() / 2
