"""Pool adjacent violators, row by row."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_cap.kernels.cpu.jit import kernel


@kernel
def pool_rows(values: Any, out: Any, first: int, last: int) -> None:
    """Least-squares non-decreasing fit of rows ``first .. last`` of ``values`` ``(k, B)``; the first infinity ends a row."""
    B = values.shape[1]
    sums, counts = np.zeros(B), np.zeros(B, np.int64)
    for k in range(first, last):
        top = n = 0
        while n < B and np.isfinite(values[k, n]):
            sums[top], counts[top] = values[k, n], 1
            while top > 0 and sums[top - 1] / counts[top - 1] > sums[top] / counts[top]:
                top -= 1
                sums[top] += sums[top + 1]
                counts[top] += counts[top + 1]
            top += 1
            n += 1
        place = 0
        for pool in range(top):
            mean = sums[pool] / counts[pool]
            for _ in range(counts[pool]):
                out[k, place] = mean
                place += 1
        for j in range(n, B):
            out[k, j] = np.inf
