"""The inner loop of the CPU solver, with its accumulators in vector registers, as an intrinsic of numba.

Compilers leave ``panel -= C @ Y`` for a few rows at once in memory, and at times do not vectorise it. Here a tile of
``rows`` rows by ``vectors`` 64-byte vectors is loaded, all of ``Y`` is subtracted, and it is stored once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from lightning_cap.kernels.cpu.jit import kernel

_MOST, _MOST64 = float(np.finfo(np.float32).max), float(np.finfo(np.float64).max)
BYTES = 64  # one vector: a cache line; split into registers where those are narrower


def spread(builder: Any, value: Any, lanes: int) -> Any:
    """A vector of one value."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), lanes), None))


def _tile(rows: int, vectors: int) -> Any:
    """``tile(panel, first, Y, start, stop, c, column)``: subtract ``Σ_s c[s, column + a] · Y[s, j]`` from ``panel[a, j]``.

    ``j`` runs over ``vectors`` times 64 bytes of entries from ``first``, ``s`` from ``start`` to ``stop``, ``a`` over the rows. All
    three arrays are C-contiguous, two-dimensional and of one float type; nothing is checked.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        panel_type, _, y_type, _, _, c_type, _ = signature.args
        scalar = context.get_value_type(panel_type.dtype)
        lanes = BYTES // context.get_abi_sizeof(scalar)
        vector = ir.VectorType(scalar, lanes)
        panel, y, c = (
            context.make_array(t)(context, builder, args[i]) for t, i in ((panel_type, 0), (y_type, 2), (c_type, 5))
        )
        first, start, stop, column = args[1], args[3], args[4], args[6]

        def width(array: Any) -> Any:
            return cgutils.unpack_tuple(builder, array.shape, 2)[1]

        def cell(array: Any, row: Any, column: Any) -> Any:
            return builder.gep(array.data, [builder.add(builder.mul(row, width(array)), column)])

        def columns(k: int) -> Any:
            return builder.add(first, ir.Constant(first.type, k * lanes))

        def as_vector(pointer: Any) -> Any:
            return builder.bitcast(pointer, vector.as_pointer())

        size = context.get_abi_sizeof(scalar)
        places = [
            [as_vector(cell(panel, ir.Constant(first.type, a), columns(k))) for k in range(vectors)]
            for a in range(rows)
        ]
        sums = [[cgutils.alloca_once(builder, vector) for _ in range(vectors)] for _ in range(rows)]
        pairs = [(places[a][k], sums[a][k]) for a in range(rows) for k in range(vectors)]
        for place, total in pairs:
            builder.store(builder.load(place, align=size), total)
        with cgutils.for_range_slice(builder, start, stop, ir.Constant(start.type, 1)) as (s, _):
            ys = [builder.load(as_vector(cell(y, s, columns(k))), align=size) for k in range(vectors)]
            for a in range(rows):
                factor = builder.load(cell(c, s, builder.add(column, ir.Constant(first.type, a))))
                factors = spread(builder, factor, lanes)
                for k in range(vectors):
                    product = builder.fmul(factors, ys[k], flags=["contract"])
                    builder.store(builder.fsub(builder.load(sums[a][k]), product, flags=["contract"]), sums[a][k])
        for place, total in pairs:
            builder.store(builder.load(total), place, align=size)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing: Any, panel: Any, first: Any, Y: Any, start: Any, stop: Any, c: Any, column: Any) -> Any:
        return types.void(panel, types.intp, Y, types.intp, types.intp, c, types.intp), generate

    return tile


four_rows = _tile(4, 1)
one_row = _tile(1, 2)
one_row_wide = _tile(1, 4)


@kernel
def lanes_of(kind: Any) -> int:
    """Entries of an array's type in 64 bytes."""
    return BYTES // kind.itemsize


@kernel
def largest_of(kind: Any) -> Any:
    """The largest number of an array's type."""
    return kind.dtype.type(_MOST) if kind.itemsize == 4 else kind.dtype.type(_MOST64)


@kernel
def whole(n: int, lanes: int) -> int:
    """``n`` rounded up to whole vectors."""
    return (n + lanes - 1) // lanes * lanes


@kernel
def matrix(rows: int, columns: int, kind: Any) -> Any:
    """Zeros with room for whole tiles; rows an odd number of cache lines long, so that a column does not share sets."""
    lanes = lanes_of(kind)
    lines = (columns + lanes - 1) // lanes + 4
    return np.zeros((rows, (lines | 1) * lanes), kind.dtype)


@kernel
def subtract4(panel: Any, end: int, Y: Any, start: int, stop: int, c: Any, column: int) -> None:
    """``panel[a, :end] -= Σ_{start <= s < stop} c[s, column + a] · Y[s, :end]`` for four rows ``a``; ``end`` is rounded up."""
    for j in range(0, end, lanes_of(Y)):
        four_rows(panel, j, Y, start, stop, c, column)


@kernel
def subtract1(row: Any, end: int, Y: Any, stop: int, c: Any) -> None:
    """``row[0, :end] -= Σ_{s < stop} c[s, 0] · Y[s, :end]``; ``end`` is rounded up."""
    lanes = lanes_of(Y)
    j = 0
    while j + 2 * lanes < end:
        one_row_wide(row, j, Y, 0, stop, c, 0)
        j += 4 * lanes
    if j < end:
        one_row(row, j, Y, 0, stop, c, 0)
