"""Symmetric blocks as triangles, ``B (B + 1) / 2`` floats each.

Rows and columns are in *reversed* order, the order in which blocks are factored: row ``r`` of the lower triangle, at
``r (r + 1) / 2``, holds the products of weight ``B - 1 - r`` with weights ``B - 1, B - 2, ..., B - 1 - r``.
"""

from __future__ import annotations

from typing import Any

from lightning_cap.kernels.cpu.gram import HEIGHT, MOST, most_vectors, one_vector, prefetch, two_vectors
from lightning_cap.kernels.cpu.jit import kernel
from lightning_cap.kernels.cpu.tile import lanes_of, matrix, whole


@kernel
def accumulate_blocks(packed: Any, rows: Any, first: int, last: int) -> None:
    """``packed[b] += Σ_s g_s g_sᵀ``, for rows ``(n, K, B)`` and blocks ``first .. last``.

    The sums of all ``n`` rows are formed before they are added, so that each triangle is read and written once.
    """
    n, _, B = rows.shape
    lanes = lanes_of(rows)
    width = whole(B, lanes)
    padding = width - B
    block_rows = matrix(n, width, rows)
    for b in range(first, last):
        for s in range(n):
            source, line = rows[s, b], block_rows[s]
            for j in range(B):
                line[padding + j] = source[j]
        for i in range(0, width, HEIGHT):
            for s in range(i * n // width, (i + HEIGHT) * n // width):
                for j in range(0, B, lanes):
                    prefetch(rows, s, b + 1, j)
            _add_rows(packed[b], block_rows, n, i, width, padding)


@kernel
def _add_rows(triangle: Any, rows: Any, n: int, i: int, width: int, padding: int) -> None:
    """Add the products of a tile's weights ``i, i + 1, ...`` with all from there on. The first tile holds the diagonal."""
    lanes = lanes_of(rows)
    j = i // lanes * lanes
    vectors = (width - j) // lanes % MOST
    if vectors == 1:
        one_vector(triangle, rows, n, i, j, width - 1, False)
    elif vectors == 2:
        two_vectors(triangle, rows, n, i, j, width - 1, False)
    else:
        vectors = MOST
        most_vectors(triangle, rows, n, i, j, width - 1, False)
    for column in range(j + vectors * lanes, width, MOST * lanes):
        most_vectors(triangle, rows, n, i, column, width - 1, i >= padding)


@kernel
def unpack_blocks(packed: Any, index: Any, scale: float, out: Any, first: int, last: int) -> None:
    """Full symmetric blocks from triangles: ``out[k] = scale · packed[index[k]]``, for ``k`` in ``first .. last``."""
    B = out.shape[1]
    factor = out.dtype.type(scale)
    for k in range(first, last):
        block = packed[index[k]]
        for r in range(B):
            start = r * (r + 1) // 2
            for c in range(r + 1):
                value = block[start + c] * factor
                out[k, B - 1 - r, B - 1 - c] = value
                out[k, B - 1 - c, B - 1 - r] = value


@kernel
def pack_blocks(full: Any, out: Any, first: int, last: int) -> None:
    """Triangles of full symmetric blocks ``first .. last``."""
    B = full.shape[1]
    for k in range(first, last):
        for r in range(B):
            row, start = full[k, B - 1 - r], r * (r + 1) // 2
            for c in range(r + 1):
                out[k, start + c] = row[B - 1 - c]
