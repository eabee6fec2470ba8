"""`eliminate`: the order in which the weights of every block are pruned, and what each removal costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_cap.errors import ConfigError
from lightning_cap.solver.backend import Backend, Blocks, Solve, check_blocks, choose_solve, chunk_blocks
from lightning_cap.solver.damping import solve_with_damping
from lightning_cap.sparsity.patterns import Pattern
from lightning_cap.utilities.arguments import require_instance, require_real, shown
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
        requested_damp: ``(K,)`` float64, the damp that was asked for.
    """

    rank: Tensor
    losses: Tensor
    steps: Tensor
    damp: Tensor
    use_float64: Tensor
    requested_damp: Tensor

    @classmethod
    def untouched(cls, damp: Tensor, block_size: int) -> Elimination:
        """The outcome where no weight is pruned of blocks with a ``damp`` ``(K,)``."""
        (K,), B, device = damp.shape, block_size, damp.device
        return cls(
            rank=torch.full((K, B), B, dtype=torch.int16 if B < 2**15 else torch.int32, device=device),
            losses=torch.full((K, B), torch.inf, device=device),
            steps=torch.zeros(K, dtype=torch.int64, device=device),
            damp=damp.double().clone(),
            use_float64=torch.zeros(K, dtype=torch.bool, device=device),
            requested_damp=damp.double(),
        )

    @property
    def num_damping_increased(self) -> int:
        """Blocks that factored, or rose above the rounding of their sums, only with a raised damp."""
        return int((self.damp > self.requested_damp).sum())

    @classmethod
    def joined(cls, parts: Sequence[Elimination]) -> Elimination:
        """One outcome from those of consecutive groups of blocks."""
        if len(parts) == 1:
            return parts[0]
        return cls(**{each.name: torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)})


def eliminate(
    fisher: Blocks,
    weights: Tensor,
    alive: Tensor,
    damp: float | Tensor,
    pattern: Pattern,
    progress: Progress | None = None,
    backend: Backend = "auto",
    chunk: int | None = None,
    solve: Solve | None = None,
    least_damp: Tensor | None = None,
) -> Elimination:
    """OBS elimination of every block (algorithm 1, lines 3-14, without its stored traces).

    Every block is scaled by its damped diagonal, which changes no score but lowers the condition number. Precision is decided
    per block from an estimate of it: float32 where that is safe, float64 elsewhere. A block that fails in float64 too gets ten
    times its damp until it factors.

    Args:
        fisher: ``(K, B, B)`` float32 without damp: a tensor, or anything that gives some blocks for ``fisher[index]``.
        weights: ``(K, B)`` float32.
        alive: ``(K, B)`` bool, False on padding and masked weights.
        damp: ``λ`` of equation 3, > 0; or of each block, ``(K,)``.
        pattern: Which weights may be pruned.
        progress: Called as ``progress("solve", blocks done, K)``.
        backend: ``"torch"`` (any device), ``"numba"`` (CPU), ``"triton"`` (CUDA), or the fastest that there is.
        chunk: Blocks at a time; halved when memory runs out. Default: what suits the device's caches.
        solve: Another order than that of OBS elimination, instead of a backend.
        least_damp: ``(K,)``, what a block's damp is raised to where it is less, and counted as raised. See `rounding_damp`.

    Raises:
        ConfigError: The backend cannot run here, or does not know the pattern; or an argument is something else.
    """
    check_blocks(weights, chunk, alive=alive)
    require_instance("pattern", pattern, Pattern, "Unstructured()")
    K, B = weights.shape
    requested = _each_damp(damp, K).to(weights.device)
    code = solve or choose_solve(backend, weights.device, pattern)
    out = Elimination.untouched(requested, B)
    if least_damp is not None:
        torch.maximum(out.damp, least_damp.to(out.damp), out=out.damp)
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

    solve_with_damping(blocks, out.damp[blocks], torch.float32, attempt)


def _each_damp(damp: float | Tensor, count: int) -> Tensor:
    """``(K,)`` float64.

    Raises:
        ConfigError: It is no positive number, nor as many as there are blocks.
    """
    if not isinstance(damp, Tensor):
        require_real("damp", damp, "(0, inf)", example=1e-8)
        return torch.full((count,), float(damp), dtype=torch.float64)
    if damp.shape != (count,) or not damp.is_floating_point() or not bool((damp > 0).all() & damp.isfinite().all()):
        raise ConfigError(
            f"damp={shown(damp)}: give a number above 0, e.g. 1e-8, or {count} of them, one for each block."
        )
    return damp.double()
