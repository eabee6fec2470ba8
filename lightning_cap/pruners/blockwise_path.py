"""The path of methods that order the weights of every block: the global cut, and the kept weights that it leaves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cap.calibration.sources import (
    GradientSource,
    SourceMemory,
    check_repeatable,
    limit_rows,
    memory_of,
    to_owners,
)
from lightning_cap.errors import GradientError
from lightning_cap.fisher.memory_plan import MemoryPlan
from lightning_cap.pruners.base import Pruner
from lightning_cap.pruners.paths import PruneResult, WeightPath, pack_weights, some_scores
from lightning_cap.pruners.zero_gradients import check_zeros
from lightning_cap.solver import Elimination
from lightning_cap.solver.damping import Damp, block_damps
from lightning_cap.solver.ranking import at_group_ends, select
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.arguments import require_list
from lightning_cap.utilities.distributed import gather_rows, gather_tensors, raise_on_all_ranks, world_size
from lightning_cap.utilities.memory import release_memory
from lightning_cap.utilities.progress import Progress


class BlockMethod(Pruner):
    """A pruner that plans, reads, orders and rebuilds blocks; a `BlockwisePath` says when and which."""

    damp: Damp

    @abstractmethod
    def plan_blocks(self, layout: BlockLayout, alive: Tensor, source: SourceMemory) -> MemoryPlan:
        """The plan of an event; ``alive`` is ``(K, B)`` bool. See `Pruner.plan`."""

    @abstractmethod
    def read_blocks(self, layout: BlockLayout, plan: MemoryPlan, number: int, gradients: GradientSource) -> Any:
        """Read the source for this rank's blocks of one pass, as what has a ``diagonal`` ``(k, B)`` and a ``count`` of samples."""

    @abstractmethod
    def order_blocks(
        self, fisher: Any, weights: Tensor, alive: Tensor, damp: Tensor, chunk: int, progress: Progress | None
    ) -> Elimination:
        """Order and losses of blocks ``(k, B)`` with what `read_blocks` gave for them and a ``damp`` ``(k,)`` each.

        ``chunk`` of them are solved at a time.
        """

    def merge_scores(self, losses: Tensor) -> Tensor:
        """What blocks are merged by, ``(k, B)`` float32, not decreasing along a block; of the losses by step."""
        return losses

    def other_scores(self, losses: Tensor) -> Iterator[Tensor]:
        """Other scores that blocks may be merged by instead, one after the other. See `PruningPath.candidates`."""
        yield from ()

    @abstractmethod
    def rebuild_blocks(
        self,
        fisher: Any,
        weights: Tensor,
        alive: Tensor,
        pruned: Tensor,
        damp: Tensor,
        use_float64: Tensor,
        chunk: int,
    ) -> Tensor:
        """The weights ``(k, B)`` without the ``pruned`` ones."""

    def rebuild_together(
        self, fisher: Any, layout: BlockLayout, weights: Tensor, alive: Tensor, pruned: Tensor
    ) -> Tensor | None:
        """The same for the blocks ``(K, B)`` of all processes at once, by a method that looks beyond blocks; None for others.

        Every process must call it, with what it has read in the only pass.
        """
        return None


class BlockwisePath(WeightPath):
    """The order in which the weights of every block are pruned and what that costs; owns the Fisher until `close`.

    With several processes each has some of the blocks: their Fisher, their order and their losses.

    Attributes:
        plan: Where the Fisher is, in how many passes it is built, and which rank has which blocks.
        elimination: Order and losses of this rank's blocks that are not fully masked, in rising order.
        stats: Numbers for logs, of all ranks together.
    """

    def __init__(
        self,
        pruner: BlockMethod,
        targets: Targets,
        layout: BlockLayout,
        masks: Mapping[str, Tensor] | None,
        gradients: GradientSource,
        progress: Progress | None,
    ) -> None:
        super().__init__(targets, layout, masks, pruner.cost, pruner.predicts_loss)
        self._pruner, self._gradients, self._progress = pruner, gradients, progress
        self._targets = targets
        layout = self._layout
        if self._shards is not None:
            gradients = self._gradients = to_owners(gradients, self._shards)
        self._weights = self._read_weights("Reading the weights")
        self.plan = pruner.plan_blocks(layout, self._alive, memory_of(gradients))
        limit_rows(gradients, self.plan.rows)
        check_repeatable(gradients, self.plan.passes)
        self._own = torch.cat(self.plan.groups)  # (K_r,)
        self._sizes = [sum(len(share[r]) for share in self.plan.shares) for r in range(world_size())]
        self._kept: Any = None  # of the only pass
        self._closed = False
        self._seen: dict[int, Tensor] = {}  # diagonals of the first time that each group was read
        parts = [Elimination.untouched(torch.empty(0, device=self._alive.device), layout.block_size)]
        found, count = [], 0  # whether anything of a block is not zero, and the samples
        for number, blocks in enumerate(self.plan.groups if sum(self._sizes) else ()):
            fisher = self._fisher(number)
            here = blocks.to(self._alive.device)
            diagonal, alive = fisher.diagonal.to(here.device), self._alive[here]
            damp = block_damps(pruner.damp, diagonal, alive, self._layers(blocks).to(here.device), len(layout.spans))
            with raise_on_all_ranks("Solving the blocks"):
                parts.append(
                    pruner.order_blocks(fisher, self._weights[here].float(), alive, damp, self.plan.chunk, progress)
                )
            found.append(((diagonal != 0) & alive).any(-1))
            count = fisher.count
            self._kept = fisher if self.plan.passes == 1 else None
            del fisher
        self._check_zeros(torch.cat(found) if found else None, count)
        self.elimination: Elimination = Elimination.joined(parts)
        del parts
        self._scores = self._at_group_ends(pruner.merge_scores(self.elimination.losses))
        self.stats = self._gather_stats()

    def _at_group_ends(self, scores: Tensor) -> Tensor:
        pattern = self._pruner.pattern
        return at_group_ends(scores, self.elimination.rank, pattern.group_size) if pattern.whole_groups else scores

    def _read_weights(self, what: str) -> Tensor:
        """The weights of the blocks that are here."""
        if self._shards is not None:
            return pack_weights(self._targets, self._layout, self._alive, self._shards)
        with raise_on_all_ranks(what):
            return pack_weights(self._targets, self._layout, self._alive)

    def _fisher(self, number: int) -> Any:
        """Read the gradients for the blocks of one pass."""
        blocks = self._pruner.read_blocks(self._layout, self.plan, number, self._gradients)
        release_memory(self.plan.device)  # what the rows took is for the solver now
        if self.plan.passes > 1:
            with raise_on_all_ranks("Reading the gradients again"):
                self._check_same(number, blocks)
        return blocks

    def _check_same(self, number: int, blocks: Any) -> None:
        """Refuse a second pass that saw other gradients: its blocks would not be those that were solved."""
        diagonal = blocks.diagonal
        first = self._seen.setdefault(number, diagonal)
        scale = first.amax() if first.numel() else first.new_zeros(())
        if first is not diagonal and not torch.allclose(first, diagonal, rtol=1e-3, atol=1e-6 * float(scale)):
            raise GradientError(
                "gradients: they differ between two passes over the source, which memory makes necessary. Give a source that "
                "yields the same rows each time (no shuffling, no new augmentation), or raise max_memory."
            )

    def _layers(self, blocks: Tensor) -> Tensor:
        """The number of the target of each block, ``(k,)`` int64 on the CPU."""
        ends = torch.tensor([span.stop for span in self._layout.spans.values()])
        return torch.bucketize(blocks.cpu(), ends, right=True)

    def _check_zeros(self, found: Tensor | None, count: int) -> None:
        """Refuse gradients that are all zero. Every process must call it, with ``(K_r,)`` bool of its own blocks."""
        if found is None:  # no process has a weight left to prune
            return
        own = torch.zeros(len(self._layout.spans), dtype=torch.int64)
        own.index_add_(0, self._layers(self._own), found.cpu().long())
        alive = self._of_all([self._alive[span].any().long() for span in self._layout.spans.values()])
        all_ranks = torch.stack(gather_tensors(own.to(self._alive.device))).sum(0).tolist()
        any_found = {
            n: n_found > 0 for n, n_found, left in zip(self._layout.spans, all_ranks, alive, strict=True) if left
        }
        check_zeros(any_found, count, self._pruner.statistic.unit if self._pruner.statistic else "gradients")

    def _gather_stats(self) -> dict[str, float]:
        own = self.elimination
        numbers = [
            float(own.use_float64.sum()),
            float(own.num_damping_increased),
            max([0.0, *own.damp.tolist()]),
        ]
        all_ranks = torch.stack(gather_tensors(torch.tensor(numbers, dtype=torch.float64, device=own.damp.device)))
        return {
            "blocks": float(self._layout.num_blocks if self._shards is None else self._shards.layout.num_blocks),
            "blocks_float64": float(all_ranks[:, 0].sum()),
            "blocks_damping_increased": float(all_ranks[:, 1].sum()),
            "largest_damp": float(all_ranks[:, 2].max()),
            "passes": float(self.plan.passes),
        }

    def at(self, sparsity: float) -> PruneResult:
        """Cut every block at its prefix and reconstruct the kept weights. See `PruningPath.at`.

        With a plan of several passes the gradients are read again, once for each group of blocks. Every process must call it.
        """
        if self._closed:
            raise GradientError("path: it was closed, and its Fisher was freed. Call pruner.path(...) again.")
        cut = self._cut(sparsity, self._scores)
        if cut is None:
            return self._result(self._weights, self._alive, 0.0, self.stats)
        return self._at_cut(cut)

    def candidates(self, sparsity: float) -> tuple[PruneResult, ...]:
        """One for each way to merge the blocks. See `PruningPath.candidates`."""
        results = [self.at(sparsity)]
        if self._pruner.pattern.sparsity is None and results[0].sparsity > self.sparsity:
            for scores in self._pruner.other_scores(self.elimination.losses):
                cut = self._cut(sparsity, self._at_group_ends(scores))
                assert cut is not None  # the first result is sparser than the model
                results.append(self._at_cut(cut))
        return tuple(results)

    def _at_cut(self, cut: Tensor) -> PruneResult:
        """The result with so many weights pruned of each of this rank's blocks."""
        own = self._own.to(self._alive.device)
        mine = self._alive[own] & (self.elimination.rank < cut.unsqueeze(-1))
        if self._shards is not None:
            gone, moved = torch.zeros_like(self._alive), self._weights.clone()
            gone[own], moved[own] = mine, self._reconstruct(own, mine)
            return self._result(moved, self._alive & ~gone, self._loss(cut), self.stats)
        blocks = torch.cat([share[r] for r in range(world_size()) for share in self.plan.shares]).to(own.device)
        pruned = torch.zeros_like(self._alive)
        pruned[blocks] = gather_rows(mine, self._sizes)
        weights = self._pruner.rebuild_together(self._kept, self._layout, self._weights, self._alive, pruned)
        if weights is None:
            weights = self._weights.clone()
            weights[blocks] = gather_rows(self._reconstruct(own, mine), self._sizes)
        return self._result(weights, self._alive & ~pruned, self._loss(cut), self.stats)

    def _reconstruct(self, own: Tensor, pruned: Tensor) -> Tensor:
        """The weights of this rank's blocks without the ``pruned`` ones, ``(K_r, B)``."""
        if self.plan.passes > 1:
            now = self._read_weights("Reading the weights")
            with raise_on_all_ranks("Reading the weights"):
                self._check_unchanged(now)
            del now
        parts, first = [self._weights[:0]], 0
        for number, group in enumerate(self.plan.groups if sum(self._sizes) else ()):
            fisher = self._kept if self._kept is not None else self._fisher(number)
            part = slice(first, first + len(group))
            damp, use_float64 = self.elimination.damp[part], self.elimination.use_float64[part]
            given = self._weights[own[part]], self._alive[own[part]], pruned[part], damp, use_float64
            with raise_on_all_ranks("Reconstructing the weights"):
                parts.append(self._pruner.rebuild_blocks(fisher, *given, self.plan.chunk))
            first = part.stop
            del fisher
        return torch.cat(parts)

    def _check_unchanged(self, now: Tensor) -> None:
        if not torch.equal(now, self._weights):
            raise GradientError(
                "path: the weights have changed since it was made, and memory makes it necessary to compute the gradients again "
                "for every result. Take all results before one is applied, put the weights back in between, or raise "
                "max_memory."
            )

    def curve(self, sparsities: Sequence[float]) -> list[float]:
        """Sums of the raw marginal losses. See `PruningPath.curve`."""
        require_list("sparsities", sparsities, "[0.5, 0.75]")
        cuts = [self._cut(sparsity, self._scores) for sparsity in sparsities]
        return [0.0 if cut is None else self._loss(cut) for cut in cuts]

    def scores(self, most: int) -> Tensor:
        """What blocks are merged by, of this process's blocks. See `PruningPath.scores`."""
        return some_scores(self._scores, self._scores.isfinite(), most)

    def close(self) -> None:
        """Free the Fisher."""
        self._kept, self._closed = None, True

    def _cut(self, sparsity: float, scores: Tensor) -> Tensor | None:
        """How many weights of each of this rank's blocks are pruned, ``(K_r,)``; None if the model is sparser already."""
        self._pruner.pattern.check_sparsity(sparsity)
        if self._pruner.pattern.sparsity is not None:
            return self.elimination.steps
        zeros = self._budget(sparsity)
        if zeros is None:
            return None
        allocation, spans = self._pruner.allocation, self._layout.spans
        rows = {n: ((self._own >= s.start) & (self._own < s.stop)).nonzero().squeeze(1) for n, s in spans.items()}
        rows = {name: own.to(scores.device) for name, own in rows.items()}
        removals, most = self._removals(allocation, zeros), self._most(allocation)
        if most and self._pruner.pattern.whole_groups:
            size = self._pruner.pattern.group_size
            most = {name: count // size * size for name, count in most.items()}
        cut = select(scores, rows, removals, most, sharded=world_size() > 1).sum(-1)
        return self._whole_groups(cut) if self._pruner.pattern.whole_groups else cut

    def _whole_groups(self, cut: Tensor) -> Tensor:
        """Steps back to where every group is whole; a cut inside of one is at most in one block of each budget."""
        size = self._pruner.pattern.group_size
        own = self._own.to(self._alive.device)
        alive: Tensor = self._alive[own].view(len(own), -1, size)
        pruned = alive & (self.elimination.rank < cut.unsqueeze(-1)).view_as(alive)
        whole = pruned.any(-1) & (pruned == alive).all(-1)
        return (pruned & whole.unsqueeze(-1)).sum((-1, -2))

    def _loss(self, cut: Tensor) -> float:
        taken = torch.arange(self._layout.block_size, device=cut.device) < cut.unsqueeze(-1)
        own = torch.where(taken, self.elimination.losses, 0.0).sum(dtype=torch.float64)
        return float(sum(float(part) for part in gather_tensors(own)))
