"""CAP, the correlation-aware pruner (Kuznedelev et al. 2023, section 3.1, algorithm 1)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_cap.allocation import Allocation, Global, block_scores, smallest
from lightning_cap.errors import ConfigError, GradientError
from lightning_cap.fisher import EmpiricalFisher
from lightning_cap.hooks import Progress
from lightning_cap.patterns import Pattern, as_pattern
from lightning_cap.pruners.base import GradientSource, Pruner, PruneResult, PruningPath, pack_weights
from lightning_cap.solver import Elimination, eliminate, reconstruct
from lightning_cap.targets import BlockLayout, Targets


class CAP(Pruner):
    """Optimal Brain Surgeon inside blocks of the empirical Fisher, one weight at a time, merged over the model.

    Args:
        block_size: Weights in a Fisher block, ``B``. Memory is ``d·B·4`` bytes, time ``O(d·B²)``.
        num_gradients: Gradient samples, ``N`` of equation 3.
        samples_per_gradient: Inputs ``m`` whose mean loss gives one gradient sample. The scale of the Fisher against
            ``damp`` changes with it, since a gradient is that of the mean loss: noise in it shrinks as ``1/m``.
            ``m = 1`` (per-sample gradients) makes the most of each image.
        damp: ``λ`` of equation 3.
        ranking: How blocks are merged: ``"marginal"`` (least predicted loss in all) or the paper's ``"cumulative"``.
        allocation: How zeros are shared out over the targets. Default: `Global`.
        pattern: Which masks are allowed, a `Pattern`. Default: `Unstructured`.

    Raises:
        ConfigError: A number is out of range.
        PatternError: ``pattern`` is not a pattern, such as the number 124 that YAML makes of an unquoted ``2:4``.
    """

    def __init__(
        self,
        block_size: int = 192,
        num_gradients: int = 4096,
        samples_per_gradient: int = 1,
        damp: float = 1e-8,
        ranking: Literal["marginal", "cumulative"] = "marginal",
        allocation: Allocation | None = None,
        pattern: Pattern | int | str | None = None,
    ) -> None:
        for name, value in (
            ("block_size", block_size),
            ("num_gradients", num_gradients),
            ("samples_per_gradient", samples_per_gradient),
        ):
            if value < 1:
                raise ConfigError(f"{name}={value}: give a whole number of at least 1.")
        if not 0 < damp < float("inf"):
            raise ConfigError(f"damp={damp}: the Fisher needs a positive damp to be invertible. Try 1e-8 ... 1e-4.")
        if ranking not in ("marginal", "cumulative"):
            raise ConfigError(f"ranking={ranking!r}: choose 'marginal' or 'cumulative'.")
        self.block_size = block_size
        self.num_gradients = num_gradients
        self.samples_per_gradient = samples_per_gradient
        self.damp = damp
        self.ranking = ranking
        self.allocation = allocation or Global()
        self.pattern = as_pattern(pattern)

    def check(self, targets: Targets) -> None:
        """Refuse targets that the pattern does not divide."""
        self._layout(targets)

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse a sparsity that the pattern cannot give."""
        self.pattern.check_sparsity(sparsity)

    def peak_bytes(self, targets: Targets) -> int:
        """The Fisher and the buffer of gradient rows."""
        layout = self._layout(targets)
        return EmpiricalFisher.bytes(layout)

    def path(
        self,
        targets: Targets,
        gradients: GradientSource,
        masks: Mapping[str, Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> CAPPath:
        """Accumulate the Fisher and eliminate every block to its end."""
        layout = self._layout(targets)
        fisher = EmpiricalFisher(layout, next(iter(targets.values())).device)
        for chunk in gradients:
            fisher.update(chunk)
        path = CAPPath(self, targets, layout, masks, fisher.finish(), progress)
        redamped = path.elimination.num_redamped
        if redamped:
            warnings.warn(
                f"damp={self.damp:g}: {redamped} of {layout.num_blocks} Fisher blocks factored only with a larger one (up to "
                f"{float(path.elimination.damp.max()):g}). Raise damp if there are many.",
                stacklevel=2,
            )
        return path

    def _layout(self, targets: Targets) -> BlockLayout:
        return targets.blocks(self.block_size, self.pattern.group_size)


class CAPPath(PruningPath):
    """The order of elimination in every block and its marginal losses; owns the Fisher until `close`."""

    def __init__(
        self,
        pruner: CAP,
        targets: Targets,
        layout: BlockLayout,
        masks: Mapping[str, Tensor] | None,
        fisher: Tensor,
        progress: Progress | None,
    ) -> None:
        super().__init__(targets, layout, masks)
        self._pruner = pruner
        self._fisher: Tensor | None = fisher
        self._weights = pack_weights(targets, layout, self._alive)
        self.elimination: Elimination = eliminate(
            fisher, self._weights.float(), self._alive, pruner.damp, pruner.pattern, progress
        )
        self._scores = block_scores(self.elimination.losses, pruner.ranking)

    def at(self, sparsity: float) -> PruneResult:
        """Cut every block at its prefix and reconstruct the kept weights. See `PruningPath.at`."""
        if self._fisher is None:
            raise GradientError("path: it was closed, and its Fisher is gone. Call pruner.path(...) again.")
        cut = self._cut(sparsity)
        stats = {
            "blocks": float(self._layout.num_blocks),
            "blocks_float64": float(self.elimination.precise.sum()),
            "blocks_redamped": float(self.elimination.num_redamped),
        }
        if cut is None:
            return self._result(self._weights, self._alive, 0.0, stats)
        pruned = self._alive & (self.elimination.rank < cut.unsqueeze(-1))
        weights = reconstruct(
            self._fisher, self._weights, self._alive, pruned, self.elimination.damp, self.elimination.precise
        )
        return self._result(weights, self._alive & ~pruned, self._loss(cut), stats)

    def curve(self, sparsities: Sequence[float]) -> list[float]:
        """Sums of the raw marginal losses. See `PruningPath.curve`."""
        cuts = [self._cut(sparsity) for sparsity in sparsities]
        return [0.0 if cut is None else self._loss(cut) for cut in cuts]

    def close(self) -> None:
        """Free the Fisher."""
        self._fisher = None

    def _cut(self, sparsity: float) -> Tensor | None:
        """How many weights each block loses, ``(K,)``; None if the model is sparser already."""
        self._pruner.pattern.check_sparsity(sparsity)
        if self._pruner.pattern.sparsity is not None:
            return self.elimination.steps
        zeros = self._budget(sparsity)
        if zeros is None:
            return None
        cut = torch.zeros_like(self.elimination.steps)
        existing, spans = self._existing(), self._layout.spans
        for names, share in self._pruner.allocation.budgets(self._layout.sizes, existing, zeros):
            blocks = torch.cat([torch.arange(spans[n].start, spans[n].stop, device=cut.device) for n in names])
            remove = share - sum(existing[name] for name in names)
            cut[blocks] = smallest(self._scores[blocks], remove).sum(-1)
        return cut

    def _loss(self, cut: Tensor) -> float:
        taken = torch.arange(self._layout.block_size, device=cut.device) < cut.unsqueeze(-1)
        return float(torch.where(taken, self.elimination.losses, 0.0).sum(dtype=torch.float64))
