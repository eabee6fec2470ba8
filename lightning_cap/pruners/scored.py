"""Methods that give every weight one saliency and prune those of least saliency: what they have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_cap.calibration.sources import NO_MEMORY, GradientSource, SourceMemory
from lightning_cap.errors import GradientError, PatternError
from lightning_cap.fisher.memory_plan import MemoryPlan, plan_reading
from lightning_cap.healing import HealArgument, as_heal
from lightning_cap.pruners.base import Pruner, check_path_arguments, require_allocation
from lightning_cap.pruners.paths import PruneResult, WeightPath, pack_weights, some_scores
from lightning_cap.pruners.row_mean import temporary_bytes
from lightning_cap.solver.ranking import select, smallest
from lightning_cap.sparsity.allocation import Allocation, Global
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.masks import check_masks
from lightning_cap.sparsity.patterns import Pattern, PatternArgument, as_pattern
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_list
from lightning_cap.utilities.progress import Progress


@dataclass(kw_only=True, eq=False)
class Scored(Pruner):
    """Base of methods with one saliency per weight; subclasses say in `_saliency` what it is. Kept weights are not changed.

    Takes every pattern: groups and output rows are ranked by their mean saliency per weight.

    Args:
        allocation: How zeros are shared out over the targets.
        pattern: Which masks are allowed. Default: `Unstructured`.
        heal: What moves the kept weights after pruning; see `LayerwiseHeal`.

    Raises:
        ConfigError: ``allocation`` is none.
        PatternError: ``pattern`` is not a pattern, or constrains groups without a sparsity of its own.
    """

    allocation: Allocation = Global()
    pattern: PatternArgument = None
    heal: HealArgument = None

    def __post_init__(self) -> None:
        self.pattern = require_weightwise_pattern(self.pattern, type(self).__name__)
        require_allocation(self.allocation)
        self.heal = as_heal(self.heal)

    def check(self, targets: Targets) -> None:
        """Refuse targets that the pattern does not divide, or that the allocation does not know."""
        self.allocation.check(self._layout(targets).shapes)

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse a sparsity that the pattern cannot give."""
        self.pattern.check_sparsity(sparsity)

    def plan(
        self, targets: Targets, masks: Mapping[str, Tensor] | None = None, *, source: SourceMemory = NO_MEMORY
    ) -> MemoryPlan:
        """``O(d)``: the saliencies, in float64 while they are summed. See `Pruner.plan`."""
        require_targets(targets)
        check_masks(targets, masks)
        held, after = 13 * targets.numel, 58 * targets.numel
        return plan_reading(targets.device, source, held, temporary_bytes(targets), after)

    def path(
        self,
        targets: Targets,
        gradients: GradientSource = (),
        masks: Mapping[str, Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> ScoredPath:
        """Compute every weight's saliency."""
        check_path_arguments(targets, gradients, progress)
        layout = self._layout(targets)
        path = ScoredPath(self, targets, layout, masks)
        path.score(self._saliency(targets, layout, path.weights, gradients), self._summed(path.weights))
        return path

    @abstractmethod
    def _saliency(
        self, targets: Targets, layout: BlockLayout, weights: Tensor, gradients: GradientSource
    ) -> Tensor | Mapping[str, Tensor]:
        """``(K, B)``: what it costs to remove each weight; or ``{target: (*shape)}``."""

    def _summed(self, weights: Tensor) -> Tensor | None:
        """``(K, B)``, what to sum up over the pruned weights where that is not the saliency that they are ranked by."""
        return None

    def _layout(self, targets: Targets) -> BlockLayout:
        require_targets(targets)
        return targets.blocks(self.pattern.group_size, self.pattern.group_size)


class ScoredPath(WeightPath):
    """All weights and their saliencies.

    Args:
        pruner: Says which masks are allowed, how zeros are shared out and what a goal counts.
        targets: See `WeightPath`.
        layout: Blocks without padding, or of a pattern that is enforced in blocks.
        masks: See `WeightPath`.

    Attributes:
        weights: ``(K, B)``, zero where masked.
    """

    def __init__(
        self, pruner: Pruner, targets: Targets, layout: BlockLayout, masks: Mapping[str, Tensor] | None
    ) -> None:
        super().__init__(targets, layout, masks, pruner.cost, pruner.predicts_loss)
        self._pattern, self._allocation = pruner.pattern, pruner.allocation
        self.weights = pack_weights(targets, layout, self._alive, self._shards)
        self.stats: dict[str, float] = {}

    def score(self, saliency: Tensor | Mapping[str, Tensor], summed: Tensor | None = None) -> None:
        """Take the saliencies, which may be negative; dead weights' are ignored.

        Args:
            saliency: ``(K, B)`` or ``{target: (*shape)}``.
            summed: ``(K, B)``, what to sum up of what is pruned; default: the saliencies.

        Raises:
            GradientError: One is not finite.
        """
        packed = saliency if isinstance(saliency, Tensor) else self._layout.pack(saliency, torch.float64)
        self._saliency = packed.to(torch.float32).masked_fill_(~self._alive, 0.0)
        if not bool(torch.isfinite(self._saliency).all()):
            raise GradientError(
                "gradients: a saliency is not finite. Leave non-finite samples out, or scale the loss down."
            )
        self._summed = self._saliency if summed is None else summed
        self._signed = self._of_all([(self._saliency < 0).sum()]) != [0]

    def at(self, sparsity: float) -> PruneResult:
        """See `PruningPath.at`; ``saliency`` is the sum of those of what is pruned.

        Of whole groups and rows as many are pruned as fit into the zeros that are asked for.
        """
        pruned = self._pruned(sparsity)
        weights, chosen = self._solution(pruned)
        return self._result(weights, self._alive & ~chosen, self._sum(pruned), self.stats)

    def scores(self, most: int) -> Tensor:
        """See `PruningPath.scores`."""
        return some_scores(self._saliency, self._alive, most)

    def curve(self, sparsities: Sequence[float]) -> list[float]:
        """Sums of saliencies. See `PruningPath.curve`."""
        require_list("sparsities", sparsities, "[0.5, 0.75]")
        return [self._sum(self._pruned(sparsity)) for sparsity in sparsities]

    def _solution(self, pruned: Tensor) -> tuple[Tensor, Tensor]:
        """The weights ``(K, B)``, and which of them are pruned."""
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
        return select(scores, rows, removals, most, sharded=self._shards is not None, signed=self._signed)

    def _whole_units(self, removals: list[tuple[list[str], int]], most: dict[str, int] | None) -> Tensor:
        """Units of least saliency per weight, as many as each budget has room for."""
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
            taken = _take(torch.cat(scores), torch.cat(sizes), count).split([len(value) for value in scores])
            for name, units in zip(names, taken, strict=True):
                span, shape = self._layout.spans[name], self._layout.shapes[name]
                members = self._pattern.units(self._alive[span], shape)
                pruned[span] = (members & units.unsqueeze(1)).reshape(pruned[span].shape)
        return pruned

    def _scores_of_units(self, name: str) -> tuple[Tensor, Tensor]:
        """Saliency per weight and alive weights of each unit of a target, ``(U,)``; infinite and 0 for one that is pruned."""
        span, shape = self._layout.spans[name], self._layout.shapes[name]
        sizes = self._pattern.units(self._alive[span], shape).sum(-1)
        sums = self._pattern.units(self._saliency[span], shape).sum(-1, dtype=torch.float64)
        return torch.where(sizes > 0, (sums / sizes.clamp_min(1)).float(), torch.inf), sizes

    def _sum(self, pruned: Tensor) -> float:
        own = torch.where(pruned, self._summed, 0.0).sum(dtype=torch.float64)
        return float(own if self._shards is None else distributed.sum_over_ranks(own))


def _take(scores: Tensor, sizes: Tensor, count: int) -> Tensor:
    """The units ``(U,)`` of least score that have ``count`` weights together, or as many as fit."""
    if len(sizes) and bool((sizes == sizes[0]).all()) and int(sizes[0]):
        return smallest(scores, count // int(sizes[0]), signed=True)
    order = scores.argsort(stable=True)
    fits = (sizes[order].cumsum(0) <= count) & (sizes[order] > 0)
    return torch.zeros_like(fits).scatter_(0, order, fits)


def require_weightwise_pattern(pattern: object, method: str) -> Pattern:
    """A pattern for which one saliency per weight is enough.

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
