"""Methods that give every weight one saliency and remove the least: what they have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource, reading
from lightning_cap.errors import ConfigError, GradientError, PatternError
from lightning_cap.fisher.memory_plan import MemoryPlan
from lightning_cap.pruners.base import Pruner, PruneResult, PruningPath, pack_weights
from lightning_cap.solver.ranking import select, smallest
from lightning_cap.sparsity.allocation import Allocation, Global
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.patterns import Pattern, as_pattern
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from lightning_cap.utilities.progress import Progress


class Scored(Pruner):
    """Base of methods with one saliency a weight; subclasses say in `_saliency` what it is. Kept weights are not changed.

    Takes every pattern: groups and output rows go by the sum of their saliencies a weight.

    Args:
        allocation: How zeros are shared out over the targets. Default: `Global`.
        pattern: Which masks are allowed. Default: `Unstructured`.

    Raises:
        PatternError: ``pattern`` is not a pattern, or constrains groups without a sparsity of its own.
    """

    def __init__(self, allocation: Allocation | None = None, pattern: Pattern | int | str | None = None) -> None:
        self.allocation = allocation or Global()
        self.pattern = require_weightwise_pattern(pattern, type(self).__name__)

    def check(self, targets: Targets) -> None:
        """Refuse targets that the pattern does not divide, or that the allocation does not know."""
        self.allocation.check(self._layout(targets).shapes)

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse a sparsity that the pattern cannot give."""
        self.pattern.check_sparsity(sparsity)

    def plan(self, targets: Targets, masks: Mapping[str, Tensor] | None = None, *, rows_bytes: int = 0) -> MemoryPlan:
        """``O(d)``: the saliencies, in float64 while they are summed. See `Pruner.plan`."""
        return MemoryPlan(targets.device, 3 * rows_bytes + 32 * targets.numel)

    def path(
        self,
        targets: Targets,
        gradients: GradientSource = (),
        masks: Mapping[str, Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> ScoredPath:
        """Compute every weight's saliency."""
        layout = self._layout(targets)
        path = ScoredPath(targets, layout, masks, self.pattern, self.allocation)
        path.score(self._saliency(targets, layout, path.weights, gradients), self._losses(path.weights))
        return path

    @abstractmethod
    def _saliency(
        self, targets: Targets, layout: BlockLayout, weights: Tensor, gradients: GradientSource
    ) -> Tensor | Mapping[str, Tensor]:
        """``(K, B)``: what the loss is thought to rise by when a weight is removed; or ``{target: (*shape)}``."""

    def _losses(self, weights: Tensor) -> Tensor | None:
        """``(K, B)`` where the saliency is no loss; else None."""
        return None

    def _layout(self, targets: Targets) -> BlockLayout:
        return targets.blocks(self.pattern.group_size, self.pattern.group_size)


class ScoredPath(PruningPath):
    """All weights and their saliencies.

    Args:
        targets: See `PruningPath`.
        layout: Blocks without padding, or of a pattern that is enforced in blocks.
        masks: See `PruningPath`.
        pattern: Which masks are allowed.
        allocation: How zeros are shared out.

    Attributes:
        weights: ``(K, B)``, zero where masked.
    """

    def __init__(
        self,
        targets: Targets,
        layout: BlockLayout,
        masks: Mapping[str, Tensor] | None,
        pattern: Pattern,
        allocation: Allocation,
    ) -> None:
        super().__init__(targets, layout, masks)
        self._pattern, self._allocation = pattern, allocation
        self.weights = pack_weights(targets, layout, self._alive)
        self.stats: dict[str, float] = {}

    def score(self, saliency: Tensor | Mapping[str, Tensor], losses: Tensor | None = None) -> None:
        """Take the saliencies, which may be negative; dead weights' are ignored.

        Args:
            saliency: ``(K, B)`` or ``{target: (*shape)}``.
            losses: ``(K, B)``, what to predict as the loss of each; default: the saliencies.

        Raises:
            GradientError: One is not finite.
        """
        packed = saliency if isinstance(saliency, Tensor) else self._layout.pack(saliency, torch.float64)
        self._saliency = packed.to(torch.float32).masked_fill_(~self._alive, 0.0)
        if not bool(torch.isfinite(self._saliency).all()):
            raise GradientError(
                "gradients: a saliency is not finite. Leave non-finite samples out, or scale the loss down."
            )
        self._losses = self._saliency if losses is None else losses
        self._signed = bool((self._saliency < 0).any())

    def at(self, sparsity: float) -> PruneResult:
        """See `PruningPath.at`; ``predicted_loss`` is the sum of the saliencies of what goes.

        Of whole groups and rows so many go that there are not more zeros than asked for.
        """
        pruned = self._pruned(sparsity)
        weights, gone = self._solution(pruned)
        return self._result(weights, self._alive & ~gone, self._loss(pruned), self.stats)

    def curve(self, sparsities: Sequence[float]) -> list[float]:
        """Sums of saliencies. See `PruningPath.curve`."""
        return [self._loss(self._pruned(sparsity)) for sparsity in sparsities]

    def _solution(self, pruned: Tensor) -> tuple[Tensor, Tensor]:
        """The weights ``(K, B)``, and which of them go."""
        return self.weights.masked_fill(pruned, 0.0), pruned

    def _pruned(self, sparsity: float) -> Tensor:
        self._pattern.check_sparsity(sparsity)
        if self._pattern.sparsity is not None:
            return self._pattern.lowest_scores(self._saliency, self._alive)
        zeros = self._budget(sparsity)
        if zeros is None:
            return torch.zeros_like(self._alive)
        removals, most = self._removals(self._allocation, zeros), self._most(self._allocation)
        return self._whole_units(removals, most) if self._pattern.whole_groups else self._single(removals, most)

    def _single(self, removals: list[tuple[list[str], int]], most: dict[str, int] | None) -> Tensor:
        scores = self._saliency.masked_fill(~self._alive, torch.inf)
        device = scores.device
        rows = {n: torch.arange(span.start, span.stop, device=device) for n, span in self._layout.spans.items()}
        return select(scores, rows, removals, most, signed=self._signed)

    def _whole_units(self, removals: list[tuple[list[str], int]], most: dict[str, int] | None) -> Tensor:
        """Units of least saliency a weight, as many as have room in each budget."""
        pruned = torch.zeros_like(self._alive)
        for names, count in removals:
            scores, sizes = [], []
            for name in names:
                value, size = self._scores_of_units(name)
                if most is not None and len(names) > 1:
                    within = _take(value, size, most[name])
                    size = torch.where(within, size, 0)  # beyond the floor there is nothing to take
                    value = value.masked_fill(size == 0, torch.inf)
                scores.append(value)
                sizes.append(size)
            gone = _take(torch.cat(scores), torch.cat(sizes), count).split([len(value) for value in scores])
            for name, units in zip(names, gone, strict=True):
                span, shape = self._layout.spans[name], self._layout.shapes[name]
                members = self._pattern.units(self._alive[span], shape)
                pruned[span] = (members & units.unsqueeze(1)).reshape(pruned[span].shape)
        return pruned

    def _scores_of_units(self, name: str) -> tuple[Tensor, Tensor]:
        """Saliency a weight and alive weights of each unit of a target, ``(U,)``; infinite and 0 for one that is gone."""
        span, shape = self._layout.spans[name], self._layout.shapes[name]
        sizes = self._pattern.units(self._alive[span], shape).sum(-1)
        sums = self._pattern.units(self._saliency[span], shape).sum(-1, dtype=torch.float64)
        return torch.where(sizes > 0, (sums / sizes.clamp_min(1)).float(), torch.inf), sizes

    def _loss(self, pruned: Tensor) -> float:
        return float(torch.where(pruned, self._losses, 0.0).sum(dtype=torch.float64))


def _take(scores: Tensor, sizes: Tensor, count: int) -> Tensor:
    """The units ``(U,)`` of least score that have ``count`` weights together, or as many as fit."""
    if len(sizes) and bool((sizes == sizes[0]).all()) and int(sizes[0]):
        return smallest(scores, count // int(sizes[0]), signed=True)
    order = scores.argsort(stable=True)
    fits = (sizes[order].cumsum(0) <= count) & (sizes[order] > 0)
    return torch.zeros_like(fits).scatter_(0, order, fits)


class Sums:
    """Adds up statistics of gradient rows for every weight, over all processes, in float64.

    Args:
        targets: The weights.
        gradients: Rows; read once.
    """

    def __init__(self, targets: Targets, gradients: GradientSource) -> None:
        self._targets, self._gradients = targets, gradients
        self.count = 0

    def of(self, statistic: Any) -> dict[str, Tensor]:
        """Mean over all rows of ``statistic(rows)``, which gives ``(n, *shape)``; float64.

        Raises:
            GradientError: There is no row, a target is missing, or its rows do not have the weight's shape.
        """
        sums = {n: torch.zeros(w.shape, dtype=torch.float64, device=w.device) for n, w in self._targets.items()}
        with reading(self._gradients) as chunks:
            for chunk in chunks:
                self._check(chunk)
                for name, total in sums.items():
                    total += statistic(chunk[name].to(total.device).float()).sum(0, dtype=torch.float64)
                self.count += next(iter(chunk.values())).shape[0]
        counts = distributed.gather_counts(self.count, self._targets.device)
        if sum(counts) == 0:
            raise GradientError(
                "gradients: the source gave no gradient row. Check that the calibration batches are not empty."
            )
        return {name: distributed.sum_over_ranks(total) / sum(counts) for name, total in sums.items()}

    def _check(self, chunk: Mapping[str, Tensor]) -> None:
        for name, weight in self._targets.items():
            got = tuple(chunk[name].shape[1:]) if name in chunk else None
            if got != tuple(weight.shape):
                raise GradientError(
                    f"gradients: the rows of {name!r} have shape {got}, its weight has {tuple(weight.shape)}. Give a chunk "
                    "{target name: (n, *weight.shape)} with every target in it."
                )


def require_weightwise_pattern(pattern: Pattern | int | str | None, method: str) -> Pattern:
    """A pattern for which one saliency a weight is enough.

    Raises:
        PatternError: It is no pattern, or constrains groups without a sparsity of its own.
    """
    chosen = as_pattern(pattern)
    if chosen.group_size > 1 and chosen.sparsity is None and not chosen.whole_groups:
        raise PatternError(
            f"pattern={chosen}: {method} removes single weights, whole units, or down to a pattern's own sparsity, and this one "
            "is none of them. Use CAP, or a pattern such as NofM or BlockOf."
        )
    return chosen


def check_counts(num_gradients: int, samples_per_gradient: int) -> None:
    """Refuse numbers that are not whole and positive.

    Raises:
        ConfigError: One is not.
    """
    for name, value in (("num_gradients", num_gradients), ("samples_per_gradient", samples_per_gradient)):
        if value < 1 or value != int(value):
            raise ConfigError(f"{name}={value}: give a whole number of at least 1.")
