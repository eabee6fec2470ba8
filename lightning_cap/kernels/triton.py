"""Triton kernels of OBS elimination. Import only where triton is installed: see `triton_backend.unavailable`.

Two ways through the same steps: `eliminate_in_registers` keeps the current ``H`` of a small block in registers;
`eliminate_left_looking` keeps the scaled pivot columns of a larger one in memory and forms one row of ``H`` a step.

The columns are not kept in shared memory: triton hands that out itself, to pass tensors between threads, and has no tensor
there that outlives a step and is read at a place known at run time (Gluon, its experimental relative, has; but what is
written in it cannot be interpreted, so without a GPU nothing would test it). Closed up, they are small enough for the L1
cache, which is the same memory: 48 KiB at most at ``B = 192`` in float32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl
from triton.compiler import ASTSource as ASTSource

_GATHER: tl.constexpr = tl.constexpr(hasattr(tl, "gather"))  # since triton 3.3


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
    inside = index < B
    rows, columns = index[:, None], index[None, :]
    H = tl.load(inverse + rows * B + columns, mask=inside[:, None] & inside[None, :], other=0.0)
    w, diagonal, low, count, steps = _read(
        inverse, floor + block * B, weights + block * B, alive + block * B, group, keep, index, B
    )
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
        tl.store(rank + block * B + p, step)
        tl.store(losses + block * B + step, least * 0.5)


@triton.jit
def _pack(rows, count, to, held, STRIDE: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr):
    """Move what is held of ``count`` rows to the places ``to``, in place."""
    index, lane = tl.arange(0, P), tl.arange(0, ROWS)
    for start in range(0, count, ROWS):
        row = start + lane
        here = (row < count)[:, None] & held[None, :]
        old = tl.load(rows + row[:, None] * STRIDE + index[None, :], mask=here, other=0.0)
        tl.debug_barrier()  # all threads have read these rows before one writes to them
        tl.store(rows + row[:, None] * STRIDE + to[None, :], old, mask=here)


@triton.jit
def _repeat(part, index, P: tl.constexpr, C: tl.constexpr):
    """The ``C`` entries of ``part`` over and over, ``P`` of them; the other way round holds more registers."""
    if _GATHER:  # noqa: SIM108
        many = tl.gather(part, index % C, 0)
    else:
        many = tl.reshape(tl.broadcast_to(part[None, :], [P // C, C]), [P])
    return many


@triton.jit
def _sum_columns(scratch, step, p, width, STRIDE: tl.constexpr, P: tl.constexpr, C: tl.constexpr, T: tl.constexpr):
    """``Σ_s u_s[p] u_s`` over ``step`` columns and the first ``width`` places, in tiles of ``(T, C)``; 0 in other tiles."""
    index, lane, place = tl.arange(0, P), tl.arange(0, T), tl.arange(0, C)
    total = tl.zeros([P], scratch.dtype.element_ty)
    for first in range(0, width, C):
        part = tl.zeros([T, C], scratch.dtype.element_ty)
        here = (first + place < width)[None, :]
        for start in range(0, step, T):
            s = start + lane
            factor = tl.load(scratch + s * STRIDE + p, mask=s < step, other=0.0)
            columns = scratch + s[:, None] * STRIDE + (first + place)[None, :]
            part += factor[:, None] * tl.load(columns, mask=(s < step)[:, None] & here, other=0.0)
        total = tl.where(index // C * C == first, _repeat(tl.sum(part, axis=0), index, P, C), total)
    return total


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
    C: tl.constexpr,
    T: tl.constexpr,
    EVERY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Left-looking, every program one block after another: ``H_p: = H0_p: - Σ_s u_s[p] u_s`` over the weights that are left.

    ``scratch`` is ``(programs, 5 + B, STRIDE)``: five rows for what the vectors hold while they are packed, then one scaled
    pivot column ``u_s`` per row. The living weights come first, in their order; the rest closes up after ``EVERY`` removals.
    """
    block = tl.program_id(0).to(tl.int64)
    scratch += block * ((B + 5) * STRIDE)
    state = scratch
    scratch += 5 * STRIDE
    index = tl.arange(0, P)
    inside = index < B
    while block < blocks:
        here, at = inverse + block * (B * B), block * B
        w, diagonal, low, count, steps = _read(here, floor + at, weights + at, alive + at, group, keep, index, B)
        where = index
        left = tl.sum((count > 0).to(tl.int32), axis=0)
        step = tl.zeros_like(left)
        while step < steps:
            held = count > 0
            tl.store(state + index, w, mask=inside)
            tl.store(state + STRIDE + index, diagonal, mask=inside)
            tl.store(state + 2 * STRIDE + index, low, mask=inside)
            tl.store(state + 3 * STRIDE + index, where.to(w.dtype), mask=inside)
            tl.store(state + 4 * STRIDE + index, count.to(w.dtype), mask=inside)
            tl.debug_barrier()
            _pack(state, step + 5, tl.cumsum(held.to(tl.int32), axis=0) - 1, held, STRIDE, P, ROWS)
            tl.debug_barrier()
            there = index < left
            w = tl.load(state + index, mask=there, other=0.0)
            diagonal = tl.load(state + STRIDE + index, mask=there, other=1.0)
            low = tl.load(state + 2 * STRIDE + index, mask=there, other=1.0)
            where = tl.load(state + 3 * STRIDE + index, mask=there, other=0.0).to(tl.int32)
            count = tl.load(state + 4 * STRIDE + index, mask=there, other=0.0).to(tl.int32)
            team = where // group
            width = tl.cdiv(left, EVERY) * EVERY  # places in use until the next packing; ``where`` is who lives there
            stop = tl.minimum(steps, step + left - width + EVERY)
            left -= stop - step
            while step < stop:
                least, p = _choose(w, diagonal, count, keep, LARGEST)
                chosen = index == p
                o = tl.sum(tl.where(chosen, where, 0), axis=0)
                row = tl.load(here + o * B + where, mask=there, other=0.0, eviction_policy="evict_first")
                tl.store(rank + at + o, step)
                tl.store(losses + at + step, least * 0.5)
                scale = 1.0 / tl.sqrt(_at(diagonal, chosen))
                shift = _at(w, chosen) * scale
                u = (row - _sum_columns(scratch, step, p, width, STRIDE, P, C, T)) * scale
                tl.store(scratch + step * STRIDE + index, u, mask=index < width)
                w -= u * shift
                diagonal = tl.maximum(diagonal - u * u, low)
                count = tl.where(chosen, 0, tl.where(team == o // group, count - 1, count))
                step += 1
                tl.debug_barrier()  # the column is there for all threads before the next step reads it
        block += tl.num_programs(0)
