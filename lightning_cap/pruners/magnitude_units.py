"""Magnitude pruning of units, the baseline: those of the smallest weights are pruned, nothing is updated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.pruners.unit_scores import ScoredUnits
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import UnitGroup, units_of


@dataclass(kw_only=True, eq=False)
class MagnitudeUnits(ScoredUnits):
    """Remove the units of least squared L2 norm, over all their weights: rows, biases, norm entries and columns.

    After Li et al. 2017, who take the rows alone. Needs no gradients. Arguments: see `ScoredUnits`.
    """

    def _saliency(self, targets: Targets, gradients: GradientSource) -> dict[str, Tensor]:
        weights = targets.weights()
        return {name: squared_norms(group, weights) for name, group in units_of(targets).items()}


def squared_norms(group: UnitGroup, weights: dict[str, Tensor]) -> Tensor:
    """``(size,)`` float64 on the CPU."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for part in group.slices:
        squares = weights[part.name].double().square()
        lines = squares.movedim(part.dim, 0).flatten(1).sum(1) if squares.dim() > 1 else squares
        total += lines.cpu()[part.index.cpu()].sum(1)
    return total
