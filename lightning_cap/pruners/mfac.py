"""M-FAC: matrix-free inverse-Fisher products in large blocks (Frantar et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource, SourceMemory, reading
from lightning_cap.errors import PatternError
from lightning_cap.fisher.blocks import Storage
from lightning_cap.fisher.matrix_free import DynamicInverse, GradientRows, Inverse, RowBlocks, StaticInverse, at_a_time
from lightning_cap.fisher.memory_plan import MemoryModel, MemoryPlan
from lightning_cap.pruners.blockwise import GradientBlockwise
from lightning_cap.solver import Elimination
from lightning_cap.solver.damping import solve_with_damping
from lightning_cap.solver.one_step import order_by
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.utilities.arguments import require_choice
from lightning_cap.utilities.distributed import raise_on_all_ranks, world_size
from lightning_cap.utilities.memory import in_chunks
from lightning_cap.utilities.progress import Progress

_MOST = torch.finfo(torch.float32).max


#: See `MFAC`.
Mode = Literal["dynamic", "static"]


@dataclass(kw_only=True, eq=False)
class MFAC(GradientBlockwise):
    """OBS saliencies ``w_p² / (2 [F⁻¹]_pp)`` in blocks of thousands of weights, from the gradient rows alone.

    Memory is ``4·N·d`` bytes whatever the block size: no ``B × B`` matrix is ever built. All weights are pruned at once, each
    with its own update of equation 2, ``δw = -F⁻¹ Σ_q e_q w_q / [F⁻¹]_qq``, as in the paper's comparison.

    Args:
        block_size: Weights in a block, ``B``.
        num_gradients: Gradient samples, ``N``; time grows with its square.
        samples_per_gradient: Inputs whose mean loss gives one gradient sample.
        damp: ``λ`` of equation 3, the same for all blocks; or one that follows their gradients, a `RelativeDamp` or ``"auto"``.
        mode: ``"dynamic"`` factors the rows' Gram matrix for each use; ``"static"`` works out the vectors of the rank-1 updates
            once and keeps them, ``8·N·d`` bytes more, so that every further sparsity is cheap. Both give the same.
        allocation: How zeros are shared out over the targets. Default: `Global`.
        pattern: `Unstructured` or one with a sparsity of its own, such as `NofM`.
        max_memory: See `CAP`.
        row_chunk: See `CAP`.

    Raises:
        ConfigError: A setting is out of range.
        PatternError: ``pattern`` is not one, or has groups that are pruned as a whole.
    """

    block_size: int = 2048
    num_gradients: int = 1024
    mode: Mode = "dynamic"

    def __post_init__(self) -> None:
        require_choice("mode", self.mode, get_args(Mode))
        super().__post_init__()
        if self.pattern.whole_groups:
            raise PatternError(
                f"pattern={self.pattern}: MFAC has only the diagonal of the inverse, not its groups. Use CAP, WoodFisher or "
                "FastCAP with it."
            )

    def memory_model(self, layout: BlockLayout, alive: Tensor, source: SourceMemory) -> MemoryModel:
        """Gradient rows in place of Fisher blocks."""
        sizes = layout.block_size, layout.num_blocks, self.row_buffer
        rows, static = self.num_gradients, self.mode == "static"
        return _RowMemoryModel(*sizes, "full", "torch", source, world_size(), rows=rows, static=static)

    def read_blocks(self, layout: BlockLayout, plan: MemoryPlan, number: int, gradients: GradientSource) -> RowBlocks:
        """Keep the rows of this rank's blocks of one pass."""
        with raise_on_all_ranks("Making room for the gradients"):
            rows = GradientRows(layout, plan.device, self.row_buffer, "full", plan.storage_device, plan.shares[number])
        with reading(gradients) as chunks:
            for chunk in chunks:
                rows.update(chunk)
                del chunk
        return rows.finish()

    def order_blocks(
        self, fisher: RowBlocks, weights: Tensor, alive: Tensor, damp: Tensor, chunk: int, progress: Progress | None
    ) -> Elimination:
        """All weights of a block at once, by their saliency."""
        out = Elimination.untouched(damp, weights.shape[1])
        busy = self.pattern.removable(alive).any(-1).nonzero().squeeze(1)
        done = 0

        def work(blocks: Tensor) -> None:
            nonlocal done
            self._order_some(fisher, blocks, weights, alive, out)
            done += len(blocks)
            if progress is not None:
                progress("solve", done, len(busy))

        in_chunks(busy, chunk, work)
        return out

    def _order_some(self, fisher: RowBlocks, blocks: Tensor, weights: Tensor, alive: Tensor, out: Elimination) -> None:
        def attempt(chosen: Tensor, damp: Tensor, _: torch.dtype) -> Tensor:
            inverse = self._inverse(fisher, chosen, alive[chosen], damp)
            diagonal = inverse.diagonal()
            good = inverse.well_conditioned & torch.isfinite(diagonal).all(-1)
            if not bool(good.all()):
                chosen, damp = chosen[good], damp[good]
                inverse = self._inverse(fisher, chosen, alive[chosen], damp)
                diagonal = inverse.diagonal()
            scores = (weights[chosen].double().square() / diagonal / 2).clamp_max(_MOST)
            here = alive[chosen]
            pruned = here if self.pattern.sparsity is None else self.pattern.lowest_scores(scores, here)
            rank, losses = order_by(scores, pruned)
            out.rank[chosen], out.losses[chosen] = rank.to(out.rank.dtype), losses.float()
            out.steps[chosen], out.damp[chosen], out.use_float64[chosen] = pruned.sum(-1), damp, True
            if self.mode == "static":
                fisher.inverses.append((chosen, inverse))
            return good

        solve_with_damping(blocks, out.damp[blocks], torch.float64, attempt)

    def rebuild_blocks(
        self,
        fisher: RowBlocks,
        weights: Tensor,
        alive: Tensor,
        pruned: Tensor,
        damp: Tensor,
        use_float64: Tensor,
        chunk: int,
    ) -> Tensor:
        """Each pruned weight pushes the others by its own update of equation 2."""
        kept = alive & ~pruned
        result = torch.where(kept, weights, 0.0)
        touched = pruned.any(-1) & kept.any(-1)

        def move(blocks: Tensor, inverse: Inverse) -> None:
            pushed = torch.where(pruned[blocks], weights[blocks].double() / inverse.diagonal(), 0.0)
            moved = torch.where(kept[blocks], weights[blocks] - inverse.times(pushed), 0.0)
            result[blocks] = torch.where(touched[blocks].unsqueeze(-1), moved.to(result.dtype), result[blocks])

        for blocks, inverse in fisher.inverses:
            move(blocks, inverse)
        if not fisher.inverses:
            in_chunks(
                touched.nonzero().squeeze(1),
                chunk,
                lambda blocks: move(blocks, self._inverse(fisher, blocks, alive[blocks], damp[blocks])),
            )
        return result

    def _inverse(
        self, fisher: RowBlocks, blocks: Tensor, alive: Tensor, damp: Tensor
    ) -> DynamicInverse | StaticInverse:
        rows = fisher.rows(blocks).double() * alive.unsqueeze(1)
        return DynamicInverse(rows, damp) if self.mode == "dynamic" else StaticInverse(rows, damp)


@dataclass(frozen=True)
class _RowMemoryModel(MemoryModel):
    """Memory of gradient rows in place of Fisher blocks."""

    rows: int = 0
    static: bool = False

    def _kept(self, blocks: int, storage: Storage, storage_device: torch.device) -> int:
        return (12 if self.static else 4) * self.rows * blocks * self.block_size

    def chunk(self, device: torch.device, limit: int | None) -> int:
        """Blocks at a time, in no more than a quarter of ``limit``."""
        chunk = at_a_time(self.rows, self.block_size)
        while limit is not None and chunk > 1 and self._work(device, chunk) > limit // 4:
            chunk //= 2
        return chunk

    def _work(self, storage_device: torch.device, chunk: int) -> int:
        return 4 * 8 * chunk * self.rows * (self.block_size + self.rows)
