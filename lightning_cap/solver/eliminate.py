"""`eliminate`: the order in which the weights of every block go, and what each removal costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_cap.hooks import Progress
from lightning_cap.linalg import full_float32, restrict, spd_inverse
from lightning_cap.solver.torch_backend import eliminate_left_looking

if TYPE_CHECKING:  # the solver asks a pattern for candidates and knows no more of it
    from lightning_cap.patterns import Pattern

_CHUNK_FLOATS = 2**22  # floats in one (k, B, B) work array: small enough for caches, large enough to amortise calls
_DAMP_STEP = 10.0


@dataclass(frozen=True)
class Elimination:
    """The outcome of OBS elimination over all blocks.

    Attributes:
        rank: ``(K, B)`` int16 or int32, the step at which each weight goes; ``B`` for weights that never do (masked,
            padding, or kept by the pattern).
        losses: ``(K, B)`` float32 marginal losses by step, infinite past a block's last step.
        steps: ``(K,)`` int64, how many weights of each block go.
        damp: ``(K,)`` float64, the damp each block was factored with.
        precise: ``(K,)`` bool, True where float64 was needed.
        requested_damp: The damp that was asked for.
    """

    rank: Tensor
    losses: Tensor
    steps: Tensor
    damp: Tensor
    precise: Tensor
    requested_damp: float

    @property
    def num_redamped(self) -> int:
        """Blocks that factored only with a raised damp."""
        return int((self.damp > self.requested_damp).sum())


def eliminate(
    fisher: Tensor,
    weights: Tensor,
    alive: Tensor,
    damp: float,
    pattern: Pattern,
    progress: Progress | None = None,
) -> Elimination:
    """OBS elimination of every block (algorithm 1, lines 3-14, without its stored traces).

    Precision is decided a block at a time from a condition estimate: float32 where it is safe, float64 elsewhere. A
    block that fails in float64 too gets ten times its damp until it factors.

    Args:
        fisher: ``(K, B, B)`` float32 without damp.
        weights: ``(K, B)`` float32.
        alive: ``(K, B)`` bool, False on padding and masked weights.
        damp: ``λ`` of equation 3, > 0.
        pattern: Which weights may go.
        progress: Called as ``progress("solve", blocks done, K)``.
    """
    K, B = weights.shape
    device = weights.device
    out = Elimination(
        rank=torch.full((K, B), B, dtype=torch.int16 if B < 2**15 else torch.int32, device=device),
        losses=torch.full((K, B), torch.inf, device=device),
        steps=torch.zeros(K, dtype=torch.int64, device=device),
        damp=torch.full((K,), damp, dtype=torch.float64, device=device),
        precise=torch.zeros(K, dtype=torch.bool, device=device),
        requested_damp=damp,
    )
    busy = pattern.candidates(alive).any(-1).nonzero().squeeze(1)
    done = 0
    with full_float32():
        for blocks in busy.split(max(1, _CHUNK_FLOATS // B**2)):
            _eliminate_chunk(fisher[blocks], weights[blocks], alive[blocks], blocks, pattern, out)
            done += len(blocks)
            if progress is not None:
                progress("solve", done, len(busy))
    return out


def _eliminate_chunk(
    fisher: Tensor, weights: Tensor, alive: Tensor, blocks: Tensor, pattern: Pattern, out: Elimination
) -> None:
    """Eliminate some blocks in float32, and those for which that is not safe in float64, into ``out``."""
    matrix = restrict(fisher, alive, out.damp[blocks])
    inverse, safe = spd_inverse(matrix)
    _run(matrix, inverse, weights, alive, blocks, safe, pattern, out)
    if bool(safe.all()):
        return
    del matrix, inverse
    unsafe = ~safe
    fisher, weights, alive, blocks = fisher[unsafe].double(), weights[unsafe].double(), alive[unsafe], blocks[unsafe]
    out.precise[blocks] = True
    while len(blocks):
        matrix = restrict(fisher, alive, out.damp[blocks])
        inverse, safe = spd_inverse(matrix)
        _run(matrix, inverse, weights, alive, blocks, safe, pattern, out)
        unsafe = ~safe
        fisher, weights, alive, blocks = fisher[unsafe], weights[unsafe], alive[unsafe], blocks[unsafe]
        out.damp[blocks] *= _DAMP_STEP


def _run(
    matrix: Tensor,
    inverse: Tensor,
    weights: Tensor,
    alive: Tensor,
    blocks: Tensor,
    chosen: Tensor,
    pattern: Pattern,
    out: Elimination,
) -> None:
    """Run the backend on the ``chosen`` of the blocks and write into ``out``."""
    if not bool(chosen.any()):
        return
    if not bool(chosen.all()):
        matrix, inverse, weights, alive, blocks = (t[chosen] for t in (matrix, inverse, weights, alive, blocks))
    floor = matrix.diagonal(dim1=-2, dim2=-1).reciprocal()
    rank, losses = eliminate_left_looking(inverse, floor, weights, alive, pattern)
    out.rank[blocks] = rank.to(out.rank.dtype)
    out.losses[blocks] = losses.float()
    out.steps[blocks] = torch.isfinite(losses).sum(-1)
