"""`eliminate`: the order in which the weights of every block are pruned, and what each removal costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_cap.solver.backend import Backend, Blocks, Solve, check_blocks, choose_solve, chunk_blocks
from lightning_cap.solver.damping import solve_with_damping
from lightning_cap.sparsity.patterns import Pattern
from lightning_cap.utilities.arguments import require_instance, require_real
from lightning_cap.utilities.memory import in_chunks
from lightning_cap.utilities.precision import full_float32
from lightning_cap.utilities.progress import Progress

_MOST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Elimination:
    """The outcome of OBS elimination over all blocks.

    Attributes:
        rank: ``(K, B)`` int16 or int32, the step at which each weight is pruned; ``B`` for weights that never are
            (masked, padding, or kept by the pattern).
        losses: ``(K, B)`` float32 marginal losses by step, infinite past a block's last step.
        steps: ``(K,)`` int64, how many weights of each block are pruned.
        damp: ``(K,)`` float64, the damp each block was factored with.
        use_float64: ``(K,)`` bool, True where float64 was needed.
        requested_damp: The damp that was asked for.
    """

    rank: Tensor
    losses: Tensor
    steps: Tensor
    damp: Tensor
    use_float64: Tensor
    requested_damp: float

    @classmethod
    def untouched(cls, num_blocks: int, block_size: int, damp: float, device: torch.device) -> Elimination:
        """The outcome where no weight is pruned."""
        K, B = num_blocks, block_size
        return cls(
            rank=torch.full((K, B), B, dtype=torch.int16 if B < 2**15 else torch.int32, device=device),
            losses=torch.full((K, B), torch.inf, device=device),
            steps=torch.zeros(K, dtype=torch.int64, device=device),
            damp=torch.full((K,), damp, dtype=torch.float64, device=device),
            use_float64=torch.zeros(K, dtype=torch.bool, device=device),
            requested_damp=damp,
        )

    @property
    def num_damping_increased(self) -> int:
        """Blocks that factored only with a raised damp."""
        return int((self.damp > self.requested_damp).sum())

    @classmethod
    def joined(cls, parts: Sequence[Elimination]) -> Elimination:
        """One outcome from those of consecutive groups of blocks."""
        if len(parts) == 1:
            return parts[0]
        fields = ("rank", "losses", "steps", "damp", "use_float64")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}
        return cls(**joined, requested_damp=parts[0].requested_damp)


def eliminate(
    fisher: Blocks,
    weights: Tensor,
    alive: Tensor,
    damp: float,
    pattern: Pattern,
    progress: Progress | None = None,
    backend: Backend = "auto",
    chunk: int | None = None,
    solve: Solve | None = None,
) -> Elimination:
    """OBS elimination of every block (algorithm 1, lines 3-14, without its stored traces).

    Precision is decided per block from a condition estimate: float32 where that is safe, float64 elsewhere. A
    block that fails in float64 too gets ten times its damp until it factors.

    Args:
        fisher: ``(K, B, B)`` float32 without damp: a tensor, or anything that gives some blocks for ``fisher[index]``.
        weights: ``(K, B)`` float32.
        alive: ``(K, B)`` bool, False on padding and masked weights.
        damp: ``λ`` of equation 3, > 0.
        pattern: Which weights may be pruned.
        progress: Called as ``progress("solve", blocks done, K)``.
        backend: ``"torch"`` (any device), ``"numba"`` (CPU), ``"triton"`` (CUDA), or the fastest that there is.
        chunk: Blocks at a time; halved when memory runs out. Default: what suits the device's caches.
        solve: Another order than that of OBS elimination, instead of a backend.

    Raises:
        ConfigError: The backend cannot run here, or does not know the pattern; or an argument is something else.
    """
    check_blocks(weights, chunk, alive=alive)
    require_real("damp", damp, "(0, inf)", example=1e-8)
    require_instance("pattern", pattern, Pattern, "Unstructured()")
    K, B = weights.shape
    code = solve or choose_solve(backend, weights.device, pattern)
    out = Elimination.untouched(K, B, damp, weights.device)
    busy = pattern.removable(alive).any(-1).nonzero().squeeze(1)
    done = 0

    def work(blocks: Tensor) -> None:
        nonlocal done
        _eliminate_chunk(code, fisher, blocks, weights, alive, out)
        done += len(blocks)
        if progress is not None:
            progress("solve", done, len(busy))

    with full_float32():
        in_chunks(busy, chunk or chunk_blocks(B, weights.device), work)
    return out


def _eliminate_chunk(
    solve: Solve, fisher: Blocks, blocks: Tensor, weights: Tensor, alive: Tensor, out: Elimination
) -> None:
    """Eliminate some blocks into ``out``: in float32 where that is enough, else in float64."""

    def attempt(chosen: Tensor, damp: Tensor, dtype: torch.dtype) -> Tensor:
        rank, losses, done = solve(fisher, chosen, weights[chosen], alive[chosen], damp, dtype)
        taken = chosen[done]
        out.rank[taken] = rank[done].to(out.rank.dtype)
        out.losses[taken] = torch.where(losses.isinf(), torch.inf, losses.clamp(max=_MOST))[done].float()
        out.steps[taken] = torch.isfinite(losses[done]).sum(-1)
        out.damp[taken] = damp[done]
        out.use_float64[taken] = dtype == torch.float64
        return done

    solve_with_damping(blocks, torch.full_like(out.damp[blocks], out.requested_damp), torch.float32, attempt)
