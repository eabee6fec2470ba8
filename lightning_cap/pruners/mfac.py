"""M-FAC: matrix-free inverse-Fisher products in large blocks (Frantar et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource, reading
from lightning_cap.errors import ConfigError, PatternError
from lightning_cap.fisher.blocks import ROW_CHUNK, Storage
from lightning_cap.fisher.matrix_free import DynamicInverse, GradientRows, Inverse, RowBlocks, StaticInverse, at_a_time
from lightning_cap.fisher.memory_plan import MemoryModel, MemoryPlan, plan_event
from lightning_cap.pruners.blockwise import Blockwise
from lightning_cap.solver import Elimination
from lightning_cap.solver.backend import more_damp
from lightning_cap.sparsity.allocation import Allocation
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.patterns import Pattern
from lightning_cap.utilities.distributed import raise_on_all_ranks, world_size
from lightning_cap.utilities.memory import in_chunks, parse_bytes
from lightning_cap.utilities.progress import Progress

_MOST = torch.finfo(torch.float32).max


class MFAC(Blockwise):
    """OBS saliencies ``w_p² / (2 [F⁻¹]_pp)`` in blocks of thousands of weights, from the gradient rows alone.

    Memory is ``4·N·d`` bytes whatever the block size: no ``B × B`` matrix is ever built. All weights go at once, each with its own
    update of equation 2, ``δw = -F⁻¹ Σ_q e_q w_q / [F⁻¹]_qq``, as in the paper's comparison.

    Args:
        block_size: Weights in a block, ``B``.
        num_gradients: Gradient samples, ``N``; time grows with its square.
        samples_per_gradient: Inputs whose mean loss gives one gradient sample.
        damp: ``λ`` of equation 3.
        mode: ``"dynamic"`` factors the rows' Gram matrix for each use; ``"static"`` works out the vectors of the rank-1 updates
            once and keeps them, ``8·N·d`` bytes more, so that every further sparsity is cheap. Both give the same.
        allocation: How zeros are shared out over the targets. Default: `Global`.
        pattern: `Unstructured` or one with a sparsity of its own, such as `NofM`.
        max_memory: See `CAP`.
        row_chunk: See `CAP`.

    Raises:
        ConfigError: A setting is out of range.
        PatternError: ``pattern`` is not one, or has groups that go as a whole.
    """

    def __init__(
        self,
        block_size: int = 2048,
        num_gradients: int = 1024,
        samples_per_gradient: int = 1,
        damp: float = 1e-8,
        mode: Literal["dynamic", "static"] = "dynamic",
        allocation: Allocation | None = None,
        pattern: Pattern | int | str | None = None,
        max_memory: int | str | None = None,
        row_chunk: int = ROW_CHUNK,
    ) -> None:
        if mode not in ("dynamic", "static"):
            raise ConfigError(f"mode={mode!r}: choose 'dynamic' or 'static'.")
        self.mode = mode
        super().__init__(
            block_size,
            num_gradients,
            samples_per_gradient,
            damp,
            allocation,
            pattern,
            max_memory,
            backend="torch",
            row_chunk=row_chunk,
        )
        if self.pattern.whole_groups:
            raise PatternError(
                f"pattern={self.pattern}: MFAC has only the diagonal of the inverse, not its groups. Use CAP, WoodFisher or "
                "FastCAP with it."
            )

    def _plan(self, layout: BlockLayout, alive: Tensor, rows_bytes: int) -> MemoryPlan:
        static = self.mode == "static"
        sizes = _RowMemoryModel(
            layout.block_size,
            layout.num_blocks,
            self.row_chunk,
            "full",
            "torch",
            rows_bytes,
            world_size(),
            rows=self.num_gradients,
            static=static,
        )
        busy = alive.any(-1).nonzero().squeeze(1).cpu()
        plan = plan_event(sizes, busy, alive.device, parse_bytes(self.max_memory, "max_memory"))
        plan.check()
        return plan

    def _read(self, layout: BlockLayout, plan: MemoryPlan, number: int, gradients: GradientSource) -> RowBlocks:
        with raise_on_all_ranks("Making room for the gradients"):
            rows = GradientRows(layout, plan.device, self.row_chunk, "full", plan.storage_device, plan.shares[number])
        with reading(gradients) as chunks:
            for chunk in chunks:
                rows.update(chunk)
        return rows.finish()

    def _order(
        self, fisher: RowBlocks, weights: Tensor, alive: Tensor, chunk: int, progress: Progress | None
    ) -> Elimination:
        K, B = weights.shape
        out = Elimination.untouched(K, B, self.damp, weights.device)
        busy = self.pattern.removable(alive).any(-1).nonzero().squeeze(1)
        done = 0

        def work(blocks: Tensor) -> None:
            nonlocal done
            self._order_some(fisher, blocks, weights[blocks].double(), alive[blocks], out)
            done += len(blocks)
            if progress is not None:
                progress("solve", done, len(busy))

        in_chunks(busy, chunk, work)
        return out

    def _order_some(self, fisher: RowBlocks, blocks: Tensor, weights: Tensor, alive: Tensor, out: Elimination) -> None:
        damp = torch.full_like(out.damp[blocks], self.damp)
        while True:
            inverse = self._inverse(fisher, blocks, alive, damp)
            diagonal = inverse.diagonal()
            good = inverse.well_conditioned & torch.isfinite(diagonal).all(-1)
            if bool(good.all()):
                break
            damp = torch.where(good, damp, more_damp(damp))
        scores = (weights.square() / diagonal / 2).clamp_max(_MOST)
        goes = alive if self.pattern.sparsity is None else self.pattern.lowest_scores(scores, alive)
        losses, order = scores.masked_fill(~goes, torch.inf).sort(dim=-1, stable=True)
        places = torch.arange(weights.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, places).masked_fill_(~goes, weights.shape[1])
        out.rank[blocks], out.losses[blocks] = rank.to(out.rank.dtype), losses.float()
        out.steps[blocks], out.damp[blocks], out.use_float64[blocks] = goes.sum(-1), damp, True
        if self.mode == "static":
            fisher.inverses.append((blocks, inverse))

    def _rebuild(
        self,
        fisher: RowBlocks,
        weights: Tensor,
        alive: Tensor,
        lost: Tensor,
        damp: Tensor,
        use_float64: Tensor,
        chunk: int,
    ) -> Tensor:
        kept = alive & ~lost
        result = torch.where(kept, weights, 0.0)
        touched = lost.any(-1) & kept.any(-1)

        def move(blocks: Tensor, inverse: Inverse) -> None:
            pushed = torch.where(lost[blocks], weights[blocks].double() / inverse.diagonal(), 0.0)
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
