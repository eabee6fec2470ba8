"""Methods that order the weights of every block by second-order information: what they have in common."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource, check_repeatable, reading, rows_bytes
from lightning_cap.errors import ConfigError, GradientError
from lightning_cap.fisher.blocks import ROW_CHUNK, EmpiricalFisher, Storage
from lightning_cap.fisher.memory_plan import MemoryModel, MemoryPlan, plan_event
from lightning_cap.pruners.base import Pruner, PruneResult, PruningPath, in_blocks, pack_alive, pack_weights
from lightning_cap.solver import Elimination, reconstruct
from lightning_cap.solver.backend import Backend, choose_backend
from lightning_cap.solver.ranking import at_group_ends, select
from lightning_cap.sparsity.allocation import Allocation, Global
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.patterns import Pattern, as_pattern
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.distributed import gather_rows, gather_tensors, raise_on_all_ranks, world_size
from lightning_cap.utilities.memory import parse_bytes
from lightning_cap.utilities.progress import Progress


class Blockwise(Pruner):
    """Base of methods that treat blocks of consecutive weights alone and merge them over the model.

    A subclass orders the weights of blocks (`_order`) and moves those that stay (`_rebuild`); this class reads the gradients,
    shares the blocks out over processes and passes, and finds the global cut. Arguments: see `CAP`.

    Raises:
        ConfigError: A number is out of range, or the backend cannot run.
        PatternError: ``pattern`` is not one, or one that blocks cannot enforce.
    """

    predicts_loss = True

    def __init__(
        self,
        block_size: int,
        num_gradients: int,
        samples_per_gradient: int,
        damp: float,
        allocation: Allocation | None,
        pattern: Pattern | int | str | None,
        max_memory: int | str | None = None,
        storage: Storage = "auto",
        backend: Backend = "auto",
        row_chunk: int = ROW_CHUNK,
        allow_tf32: bool = False,
    ) -> None:
        for name, value in (
            ("block_size", block_size),
            ("num_gradients", num_gradients),
            ("samples_per_gradient", samples_per_gradient),
            ("row_chunk", row_chunk),
        ):
            if value < 1 or value != int(value):
                raise ConfigError(f"{name}={value}: give a whole number of at least 1.")
        if not 0 < damp < float("inf"):
            raise ConfigError(f"damp={damp}: the Fisher needs a positive damp to be invertible. Try 1e-8 ... 1e-4.")
        self.block_size = block_size
        self.num_gradients = num_gradients
        self.samples_per_gradient = samples_per_gradient
        self.damp = damp
        self.allocation = allocation or Global()
        self.pattern = in_blocks(as_pattern(pattern), type(self).__name__)
        parse_bytes(max_memory, "max_memory")
        if storage not in ("auto", "full", "packed"):
            raise ConfigError(f"storage={storage!r}: choose 'auto', 'full' or 'packed'.")
        if backend not in ("auto", "torch", "numba", "triton"):
            raise ConfigError(f"backend={backend!r}: choose 'auto', 'torch', 'numba' or 'triton'.")
        self.max_memory, self.storage, self.backend = max_memory, storage, backend
        self.row_chunk, self.allow_tf32 = row_chunk, allow_tf32

    def check(self, targets: Targets) -> None:
        """Refuse targets that the pattern does not divide or the allocation does not know, and a backend that cannot run."""
        self.allocation.check(self._layout(targets).shapes)
        choose_backend(self.backend, targets.device, self.pattern)

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse a sparsity that the pattern cannot give."""
        self.pattern.check_sparsity(sparsity)

    def plan(self, targets: Targets, masks: Mapping[str, Tensor] | None = None, *, rows_bytes: int = 0) -> MemoryPlan:
        """Where the Fisher goes and in how many passes. See `Pruner.plan`."""
        layout = self._layout(targets)
        alive = pack_alive(targets, layout, masks)
        return self._plan(layout, alive, rows_bytes)

    def state_dict(self) -> dict[str, Any]:
        """The row chunk, on which results depend by rounding."""
        return {"row_chunk": self.row_chunk}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the row chunk of the checkpoint."""
        self.row_chunk = int(state.get("row_chunk", self.row_chunk))

    def path(
        self,
        targets: Targets,
        gradients: GradientSource,
        masks: Mapping[str, Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> BlockwisePath:
        """Accumulate the Fisher and order every block to its end."""
        path = BlockwisePath(self, targets, self._layout(targets), masks, gradients, progress)
        raised = path.stats["blocks_damping_increased"]
        if raised:
            warnings.warn(
                f"damp={self.damp:g}: {raised:g} of {path.stats['blocks']:g} Fisher blocks factored only with a larger one (up to "
                f"{path.stats['largest_damp']:g}). Raise damp if there are many.",
                stacklevel=2,
            )
        return path

    def _plan(self, layout: BlockLayout, alive: Tensor, rows_bytes: int) -> MemoryPlan:
        backend = choose_backend(self.backend, alive.device, self.pattern)
        sizes = MemoryModel(
            layout.block_size, layout.num_blocks, self.row_chunk, self.storage, backend, rows_bytes, world_size()
        )
        busy = alive.any(-1).nonzero().squeeze(1).cpu()
        plan = plan_event(sizes, busy, alive.device, parse_bytes(self.max_memory, "max_memory"))
        plan.check()
        return plan

    def _layout(self, targets: Targets) -> BlockLayout:
        return targets.blocks(self.block_size, self.pattern.group_size)

    @abstractmethod
    def _order(self, fisher: Any, weights: Tensor, alive: Tensor, chunk: int, progress: Progress | None) -> Elimination:
        """Order and losses of blocks ``(k, B)`` with what `_read` gave for them, ``chunk`` of them at a time."""

    def _scores(self, losses: Tensor) -> Tensor:
        """What blocks are merged by, ``(k, B)`` float32, not decreasing along a block; of the losses by step."""
        return losses

    def _rebuild(
        self,
        fisher: Any,
        weights: Tensor,
        alive: Tensor,
        lost: Tensor,
        damp: Tensor,
        use_float64: Tensor,
        chunk: int,
    ) -> Tensor:
        """The weights ``(k, B)`` without the ``lost`` ones; by default the joint optimum of equation 5."""
        return reconstruct(fisher, weights, alive, lost, damp, use_float64, self.backend, chunk)

    def _read(self, layout: BlockLayout, plan: MemoryPlan, number: int, gradients: GradientSource) -> Any:
        """Read the gradients for this rank's blocks of one pass."""
        with raise_on_all_ranks("Making room for the Fisher"):
            fisher = EmpiricalFisher(
                layout,
                plan.device,
                self.row_chunk,
                self.storage,
                plan.storage_device,
                plan.shares[number],
                self.allow_tf32,
            )
        with reading(gradients) as chunks:
            for chunk in chunks:
                fisher.update(chunk)
        return fisher.finish()


class BlockwisePath(PruningPath):
    """The order in which every block loses its weights and what that costs; owns the Fisher until `close`.

    With several processes each has some of the blocks: their Fisher, their order and their losses.

    Attributes:
        plan: Where the Fisher is, in how many passes it is built, and which rank has which blocks.
        elimination: Order and losses of this rank's blocks that are not fully masked, in rising order.
        stats: Numbers for logs, of all ranks together.
    """

    def __init__(
        self,
        pruner: Blockwise,
        targets: Targets,
        layout: BlockLayout,
        masks: Mapping[str, Tensor] | None,
        gradients: GradientSource,
        progress: Progress | None,
    ) -> None:
        super().__init__(targets, layout, masks)
        self._pruner, self._gradients, self._progress = pruner, gradients, progress
        self._targets = targets
        with raise_on_all_ranks("Reading the weights"):
            self._weights = pack_weights(targets, layout, self._alive)
        self.plan = pruner._plan(layout, self._alive, rows_bytes(gradients))
        check_repeatable(gradients, self.plan.passes)
        self._own = torch.cat(self.plan.groups)  # (K_r,)
        self._sizes = [sum(len(share[r]) for share in self.plan.shares) for r in range(world_size())]
        self._kept: Any = None  # of the only pass
        self._closed = False
        self._seen: dict[int, Tensor] = {}  # diagonals of the first time that each group was read
        parts = [Elimination.untouched(0, layout.block_size, pruner.damp, self._alive.device)]
        for number, blocks in enumerate(self.plan.groups if sum(self._sizes) else ()):
            fisher = self._fisher(number)
            here = blocks.to(self._alive.device)
            with raise_on_all_ranks("Solving the blocks"):
                parts.append(
                    pruner._order(fisher, self._weights[here].float(), self._alive[here], self.plan.chunk, progress)
                )
            self._kept = fisher if self.plan.passes == 1 else None
            del fisher
        self.elimination: Elimination = Elimination.joined(parts)
        del parts
        self._scores = pruner._scores(self.elimination.losses)
        if pruner.pattern.whole_groups:
            self._scores = at_group_ends(self._scores, self.elimination.rank, pruner.pattern.group_size)
        self.stats = self._gather_stats()

    def _fisher(self, number: int) -> Any:
        """Read the gradients for the blocks of one pass."""
        blocks = self._pruner._read(self._layout, self.plan, number, self._gradients)
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

    def _gather_stats(self) -> dict[str, float]:
        own = self.elimination
        numbers = [
            float(own.use_float64.sum()),
            float(own.num_damping_increased),
            max([own.requested_damp, *own.damp.tolist()]),
        ]
        all_ranks = torch.stack(gather_tensors(torch.tensor(numbers, dtype=torch.float64, device=own.damp.device)))
        return {
            "blocks": float(self._layout.num_blocks),
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
            raise GradientError("path: it was closed, and its Fisher is gone. Call pruner.path(...) again.")
        cut = self._cut(sparsity)
        if cut is None:
            return self._result(self._weights, self._alive, 0.0, self.stats)
        own = self._own.to(self._alive.device)
        lost = self._alive[own] & (self.elimination.rank < cut.unsqueeze(-1))
        moved = self._reconstruct(own, lost)
        blocks = torch.cat([share[r] for r in range(world_size()) for share in self.plan.shares]).to(own.device)
        pruned = torch.zeros_like(self._alive)
        pruned[blocks] = gather_rows(lost, self._sizes)
        weights = self._weights.clone()
        weights[blocks] = gather_rows(moved, self._sizes)
        return self._result(weights, self._alive & ~pruned, self._loss(cut), self.stats)

    def _reconstruct(self, own: Tensor, lost: Tensor) -> Tensor:
        """The weights of this rank's blocks without the ``lost`` ones, ``(K_r, B)``."""
        if self.plan.passes > 1:
            with raise_on_all_ranks("Reading the weights"):
                self._check_unchanged()
        parts, first = [self._weights[:0]], 0
        for number, group in enumerate(self.plan.groups if sum(self._sizes) else ()):
            fisher = self._kept if self._kept is not None else self._fisher(number)
            part = slice(first, first + len(group))
            damp, use_float64 = self.elimination.damp[part], self.elimination.use_float64[part]
            given = self._weights[own[part]], self._alive[own[part]], lost[part], damp, use_float64
            with raise_on_all_ranks("Reconstructing the weights"):
                parts.append(self._pruner._rebuild(fisher, *given, self.plan.chunk))
            first = part.stop
            del fisher
        return torch.cat(parts)

    def _check_unchanged(self) -> None:
        now = pack_weights(self._targets, self._layout, self._alive)
        if not torch.equal(now, self._weights):
            raise GradientError(
                "path: the weights have changed since it was made, and memory makes it necessary to compute the gradients again "
                "for every result. Take all results before one is applied, put the weights back in between, or raise "
                "max_memory."
            )

    def curve(self, sparsities: Sequence[float]) -> list[float]:
        """Sums of the raw marginal losses. See `PruningPath.curve`."""
        cuts = [self._cut(sparsity) for sparsity in sparsities]
        return [0.0 if cut is None else self._loss(cut) for cut in cuts]

    def close(self) -> None:
        """Free the Fisher."""
        self._kept, self._closed = None, True

    def _cut(self, sparsity: float) -> Tensor | None:
        """How many weights each of this rank's blocks loses, ``(K_r,)``; None if the model is sparser already."""
        self._pruner.pattern.check_sparsity(sparsity)
        if self._pruner.pattern.sparsity is not None:
            return self.elimination.steps
        zeros = self._budget(sparsity)
        if zeros is None:
            return None
        allocation, spans = self._pruner.allocation, self._layout.spans
        rows = {n: ((self._own >= s.start) & (self._own < s.stop)).nonzero().squeeze(1) for n, s in spans.items()}
        rows = {name: own.to(self._scores.device) for name, own in rows.items()}
        removals, most = self._removals(allocation, zeros), self._most(allocation)
        if most and self._pruner.pattern.whole_groups:
            size = self._pruner.pattern.group_size
            most = {name: count // size * size for name, count in most.items()}
        cut = select(self._scores, rows, removals, most, sharded=world_size() > 1).sum(-1)
        return self._whole_groups(cut) if self._pruner.pattern.whole_groups else cut

    def _whole_groups(self, cut: Tensor) -> Tensor:
        """Steps back to where every group is whole; a cut inside of one is at most in one block of each budget."""
        size = self._pruner.pattern.group_size
        own = self._own.to(self._alive.device)
        alive: Tensor = self._alive[own].view(len(own), -1, size)
        gone = alive & (self.elimination.rank < cut.unsqueeze(-1)).view_as(alive)
        whole = gone.any(-1) & (gone == alive).all(-1)
        return (gone & whole.unsqueeze(-1)).sum((-1, -2))

    def _loss(self, cut: Tensor) -> float:
        taken = torch.arange(self._layout.block_size, device=cut.device) < cut.unsqueeze(-1)
        own = torch.where(taken, self.elimination.losses, 0.0).sum(dtype=torch.float64)
        return float(sum(float(part) for part in gather_tensors(own)))
