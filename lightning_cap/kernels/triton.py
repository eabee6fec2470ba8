"""Triton kernels of OBS elimination. Import only where triton is installed: see `triton_backend.unavailable`.

Two ways through the same steps: `eliminate_in_registers` keeps the current ``H`` of a small block in registers;
`eliminate_left_looking` keeps the scaled pivot columns of a larger one in memory and forms one row of ``H`` a step.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from triton.compiler import ASTSource as ASTSource


@triton.jit
def _read(inverse, floor, weights, alive, group, keep, index, B: tl.constexpr):
    """What a block starts with: weights, diagonal and its floor, `_choose`'s counts; and how many steps it takes."""
    inside = index < B
    living = tl.load(alive + index, mask=inside, other=0) != 0
    low = tl.load(floor + index, mask=inside, other=1.0)
    diagonal = tl.maximum(tl.load(inverse + index * (B + 1), mask=inside, other=1.0), low)
    w = tl.where(living, tl.load(weights + index, mask=inside, other=0.0), 0.0)
    first = index // group * group
    count = tl.zeros_like(index)
    for member in range(group):
        count += tl.load(alive + first + member, mask=inside & (first + member < B), other=0).to(tl.int32)
    steps = tl.sum(tl.where(inside & (first == index), tl.maximum(count - keep, 0), 0), axis=0)
    return w, diagonal, low, tl.where(living, count, 0), steps


@triton.jit
def _choose(w, diagonal, count, keep, LARGEST: tl.constexpr):
    """``min w² / H_pp`` and its ``p``, the lowest of equals, over the weights that may be pruned.

    ``count`` says for a living weight how many of its group live, itself included; 0 for one that is dead.
    """
    score = tl.minimum(w * w / diagonal, LARGEST)  # overflow still comes before what may not be pruned
    return tl.min(tl.where(count > keep, score, float("inf")), axis=0, return_indices=True)


@triton.jit
def _at(values, chosen):
    """The one entry that is chosen."""
    return tl.sum(tl.where(chosen, values, 0.0), axis=0)


@triton.jit
def _count_without(count, p, group, index):
    """The counts once ``p`` is dead."""
    return tl.where(index == p, 0, tl.where(index // group == p // group, count - 1, count))


@triton.jit(do_not_specialize=["group", "keep"])
def eliminate_in_registers(
    inverse, floor, weights, alive, rank, losses, group, keep, B: tl.constexpr, P: tl.constexpr, LARGEST: tl.constexpr
):
    """Right-looking, one block per program: ``H -= u uᵀ`` on a ``(P, P)`` tile. ``P`` is ``B``, padded."""
    block = tl.program_id(0).to(tl.int64)
    inverse += block * (B * B)
    index = tl.arange(0, P)
    at = block * B + index
    inside = index < B
    rows, columns = index[:, None], index[None, :]
    H = tl.load(inverse + rows * B + columns, mask=inside[:, None] & inside[None, :], other=0.0)
    w, diagonal, low, count, steps = _read(
        inverse, floor + block * B, weights + block * B, alive + block * B, group, keep, index, B
    )
    order = tl.full([P], B, tl.int32)
    loss = tl.full([P], float("inf"), H.dtype)
    for step in range(steps):
        least, p = _choose(w, diagonal, count, keep, LARGEST)
        chosen = index == p
        row = tl.sum(tl.where(rows == p, H, 0.0), axis=0)
        scale = 1.0 / tl.sqrt(_at(diagonal, chosen))
        u = row * scale
        w -= u * (_at(w, chosen) * scale)
        diagonal = tl.maximum(diagonal - u * u, low)
        H -= u[:, None] * u[None, :]
        count = _count_without(count, p, group, index)
        order = tl.where(chosen, step, order)
        loss = tl.where(index == step, least * 0.5, loss)
    tl.store(rank + at, order, mask=inside)
    tl.store(losses + at, loss, mask=inside)


@triton.jit(do_not_specialize=["blocks", "group", "keep"])
def eliminate_left_looking(
    inverse,
    floor,
    weights,
    alive,
    rank,
    losses,
    scratch,
    blocks,
    group,
    keep,
    B: tl.constexpr,
    P: tl.constexpr,
    LARGEST: tl.constexpr,
    STRIDE: tl.constexpr,
    T: tl.constexpr,
):
    """Left-looking, every program one block after another: ``H_p: = H0_p: - Σ_s u_s[p] u_s`` from ``T`` columns at a time.

    ``scratch`` is ``(programs, B, STRIDE)``, one scaled pivot column ``u_s`` per row; small enough to stay in the caches.
    """
    scratch += tl.program_id(0).to(tl.int64) * (B * STRIDE)
    index, lane = tl.arange(0, P), tl.arange(0, T)
    columns = tl.zeros([T, 1], tl.int32) + index[None, :]
    inside = index < B
    block = tl.program_id(0).to(tl.int64)
    while block < blocks:
        here = inverse + block * (B * B)
        at = block * B + index
        w, diagonal, low, count, steps = _read(
            here, floor + block * B, weights + block * B, alive + block * B, group, keep, index, B
        )
        order = tl.full([P], B, tl.int32)
        loss = tl.full([P], float("inf"), w.dtype)
        for step in range(steps):
            least, p = _choose(w, diagonal, count, keep, LARGEST)
            first = (lane == 0)[:, None] & inside[None, :]
            row = tl.load(here + p * B + columns, mask=first, other=0.0, eviction_policy="evict_first")
            chosen = index == p
            scale = 1.0 / tl.sqrt(_at(diagonal, chosen))
            shift = _at(w, chosen) * scale
            for start in range(0, step, T):
                s = start + lane
                factor = tl.load(scratch + s * STRIDE + p, mask=s < step, other=0.0)
                past = (s < step)[:, None] & inside[None, :]
                row -= factor[:, None] * tl.load(scratch + s[:, None] * STRIDE + columns, mask=past, other=0.0)
            u = tl.sum(row, axis=0) * scale
            tl.store(scratch + step * STRIDE + index, u, mask=inside)
            w -= u * shift
            diagonal = tl.maximum(diagonal - u * u, low)
            count = _count_without(count, p, group, index)
            order = tl.where(chosen, step, order)
            loss = tl.where(index == step, least * 0.5, loss)
            tl.debug_barrier()  # the column is there for all threads before the next step reads it
        tl.store(rank + at, order, mask=inside)
        tl.store(losses + at, loss, mask=inside)
        block += tl.num_programs(0)
