"""Elimination of whole groups of a Fisher block's weights."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_cap.kernels.cpu.jit import kernel
from lightning_cap.kernels.cpu.tile import largest_of, subtract1


@kernel
def _group_cost(small: Any, left: Any, w: Any, start: int, end: int, tile: Any, rest: Any, places: Any) -> Any:
    """``½ w_gᵀ (H_gg)⁻¹ w_g`` a weight (equation 5) of the group ``start .. end``, over its weights left; infinite if none are.

    ``small[start : end]`` holds its ``H_gg``. No pivot falls below 1, as no ``H_pp`` does.
    """
    one, largest = small.dtype.type(1), largest_of(small)
    loss, count = small.dtype.type(0), 0
    for o in range(start, end):
        if left[o]:
            places[count], rest[count] = o - start, w[o]
            count += 1
    if count == 0:
        return small.dtype.type(np.inf)
    for a in range(count):
        for b in range(a + 1):
            tile[a, b] = small[start + places[a], places[b]]
    for j in range(count):
        pivot = max(tile[j, j], one)
        step = rest[j] / pivot
        loss += rest[j] * step
        for a in range(j + 1, count):
            rest[a] -= tile[a, j] * step
            factor = tile[a, j] / pivot
            for b in range(j + 1, a + 1):
                tile[a, b] -= factor * tile[b, j]
    cost = loss * small.dtype.type(0.5) / small.dtype.type(count)
    return cost if cost <= largest else largest


@kernel
def eliminate_groups(
    H: Any, U: Any, n: int, w: Any, where: Any, place: Any, groups: Any, starts: Any, small: Any, left: Any, tile: Any, row: Any,
    c: Any, work: Any, rank: Any, losses: Any,
) -> None:  # fmt: skip
    """As `_eliminate` of `obs.py`, a group at a time, those of least loss a weight first; ``w`` stays in the order of ``H``.

    ``small`` ``(n, size)`` holds the part of the current ``H`` that lies inside the groups: entry ``o, l`` couples weight ``o``
    with weight ``l`` of its group.
    """
    costs, column, rest, places = work[0], work[1], work[2], np.zeros(small.shape[1], np.int64)
    one = U.dtype.type(1)
    num_groups = groups[n - 1] + 1
    for o in range(n):
        where[o], place[o], left[o] = o, o, True
        for q in range(starts[groups[o]], starts[groups[o] + 1]):
            small[o, q - starts[groups[o]]] = H[max(o, q), min(o, q)]
    for g in range(num_groups):
        costs[g] = _group_cost(small, left, w, starts[g], starts[g + 1], tile, rest, places)
    t, m = 0, n
    while t < n:
        chosen = 0
        for g in range(num_groups):
            if costs[g] < costs[chosen]:  # ties go to the earlier group
                chosen = g
        for o in range(starts[chosen], starts[chosen + 1]):
            p = place[o]
            rank[o], losses[t], left[o] = t, costs[chosen], False
            scale = one / np.sqrt(max(small[o, o - starts[chosen]], one))
            factor = w[o] * scale
            for s in range(t):
                c[s, 0] = U[s, p]
            m -= 1
            for s in range(t):
                U[s, p] = U[s, m]
            where[p] = where[m]
            place[where[p]] = p
            for j in range(m):
                row[0, j] = H[max(o, where[j]), min(o, where[j])]
            subtract1(row, m, U, t, c)
            for j in range(m):
                u, q = row[0, j] * scale, where[j]
                U[t, j] = column[q] = u
                w[q] -= factor * u
            for j in range(m):
                q = where[j]
                first = starts[groups[q]]
                for r in range(first, starts[groups[q] + 1]):
                    if left[r]:
                        small[q, r - first] -= column[q] * column[r]
            t += 1
        for g in range(num_groups):
            costs[g] = _group_cost(small, left, w, starts[g], starts[g + 1], tile, rest, places)
