"""Pooling and shrinking of packed Fisher blocks, in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_cap.kernels.cpu.jit import kernel


@kernel
def pool_triangles(packed: Any, index: Any, out: Any, first: int, last: int) -> None:
    """``out[e] = Σ_b packed[index[b], e]`` in float64, for entries ``first .. last``."""
    for e in range(first, last):
        out[e] = 0.0
    for b in range(len(index)):
        block = packed[index[b]]
        for e in range(first, last):
            out[e] += block[e]


@kernel
def shrink_triangles(packed: Any, index: Any, target: Any, share: float, first: int, last: int) -> None:
    """``F ← (1 - share) F + share · D^½ R D^½`` off the diagonal, for blocks ``first .. last`` of ``index``.

    Args:
        packed: ``(K, B (B + 1) / 2)`` triangles, see `packed.py`.
        index: ``(m,)`` int64.
        target: ``(B (B + 1) / 2)`` float32, ``R`` as a triangle of the same order.
        share: In [0, 1].
        first: Of ``index``.
        last: The end of it.
    """
    B = int((np.sqrt(8.0 * packed.shape[1] + 1.0) - 1.0) / 2.0 + 0.5)
    root = np.zeros(B, packed.dtype)
    keep, take = packed.dtype.type(1.0 - share), packed.dtype.type(share)
    for b in range(first, last):
        block = packed[index[b]]
        for r in range(B):
            root[r] = np.sqrt(block[r * (r + 3) // 2])
        for r in range(B):
            start = r * (r + 1) // 2
            row, goal = block[start : start + r], target[start : start + r]
            scale = take * root[r]
            for c in range(r):
                row[c] = keep * row[c] + scale * root[c] * goal[c]
