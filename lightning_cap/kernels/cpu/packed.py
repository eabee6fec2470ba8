"""Symmetric blocks as triangles, ``B (B + 1) / 2`` floats each.

Rows and columns are in *reversed* order, the order in which blocks are factored: row ``r`` of the lower triangle, at
``r (r + 1) / 2``, holds the products of weight ``B - 1 - r`` with weights ``B - 1, B - 2, ..., B - 1 - r``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_cap.kernels.cpu.jit import kernel
from lightning_cap.kernels.cpu.tile import lanes_of, matrix, subtract4, whole


@kernel
def accumulate_blocks(packed: Any, rows: Any, first: int, last: int) -> None:
    """``packed[b] += Σ_s g_s g_sᵀ``, for rows ``(n, K, B)`` and blocks ``first .. last``."""
    n, _, B = rows.shape
    zero = rows.dtype.type(0)
    R, panel = matrix(n, B, rows), matrix(4, B, rows)
    last_weight = np.uint64(B - 1)
    for b in range(first, last):
        for s in range(n):
            source = rows[s, b]
            for j in range(B):
                R[s, j] = source[last_weight - np.uint64(j)]
        block = packed[b]
        for start in range(0, B, 4):
            end = whole(start + 4, lanes_of(rows))
            for a in range(4):
                for j in range(end):
                    panel[a, j] = zero
            subtract4(panel, end, R, 0, n, R, start)
            for i in range(start, min(start + 4, B)):
                offset = i * (i + 1) // 2
                line = block[offset : offset + i + 1]
                for j in range(i + 1):
                    line[j] -= panel[i - start, j]


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
