"""Magnitude pruning, the baseline: the smallest absolute weights go, nothing is updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_cap.allocation import Allocation, Global, smallest
from lightning_cap.hooks import Progress
from lightning_cap.patterns import Unstructured
from lightning_cap.pruners.base import Pruner, PruneResult, PruningPath, pack_weights
from lightning_cap.sources import GradientSource
from lightning_cap.targets import Targets


class Magnitude(Pruner):
    """Remove the weights of least ``|w|`` ("GM" in the paper with the default `Global` allocation).

    Args:
        allocation: How zeros are shared out over the targets.
    """

    def __init__(self, allocation: Allocation | None = None) -> None:
        self.allocation = allocation or Global()

    def path(
        self,
        targets: Targets,
        gradients: GradientSource = (),
        masks: Mapping[str, Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> MagnitudePath:
        """Needs no gradients."""
        return MagnitudePath(self, targets, masks)


class MagnitudePath(PruningPath):
    """All weights, ordered by their absolute value."""

    def __init__(self, pruner: Magnitude, targets: Targets, masks: Mapping[str, Tensor] | None) -> None:
        super().__init__(targets, targets.blocks(1), masks)
        self._allocation = pruner.allocation
        self._weights = pack_weights(targets, self._layout, self._alive)

    def at(self, sparsity: float) -> PruneResult:
        """See `PruningPath.at`; ``predicted_loss`` is half the squared norm of what is removed."""
        pruned = self._pruned(sparsity)
        return self._result(
            self._weights.masked_fill(pruned, 0.0), self._alive & ~pruned, self._loss(pruned), {"blocks": 0.0}
        )

    def curve(self, sparsities: Sequence[float]) -> list[float]:
        """Half the squared norm of what each sparsity removes."""
        return [self._loss(self._pruned(sparsity)) for sparsity in sparsities]

    def _pruned(self, sparsity: float) -> Tensor:
        Unstructured().check_sparsity(sparsity)
        pruned = torch.zeros_like(self._alive)
        zeros = self._budget(sparsity)
        if zeros is None:
            return pruned
        existing, spans = self._existing(), self._layout.spans
        scores = self._weights.abs().masked_fill(~self._alive, torch.inf)
        for names, share in self._allocation.budgets(self._layout.sizes, existing, zeros):
            rows = torch.cat([torch.arange(spans[n].start, spans[n].stop, device=pruned.device) for n in names])
            pruned[rows] = smallest(scores[rows], share - sum(existing[name] for name in names))
        return pruned

    def _loss(self, pruned: Tensor) -> float:
        return float(torch.where(pruned, self._weights, 0.0).square().sum(dtype=torch.float64)) / 2
