"""The textbook algorithm in float64 NumPy: one weight at a time, the inverse recomputed after every removal.

Slow on purpose and written without a look at the package: it decides what is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Reference:
    order: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of what was removed
    least: list[float] = field(default_factory=list)  # of the best that could have been
    weights: list[np.ndarray] = field(default_factory=list)  # after 0, 1, 2, ... removals


def obs_block(
    fisher: np.ndarray,
    weights: np.ndarray,
    alive: np.ndarray,
    damp: float,
    nm: tuple[int, int] | None = None,
    order: Sequence[int] | None = None,
) -> Reference:
    """Optimal Brain Surgeon on one block (equation 2).

    ``nm = (n, m)`` keeps at most n of every m. ``order`` replays the removals of somebody else in place of the best.
    """
    F = np.asarray(fisher, dtype=np.float64) + damp * np.eye(len(weights))
    w = np.where(alive, np.asarray(weights, dtype=np.float64), 0.0)
    alive = np.array(alive, dtype=bool)
    out = Reference(weights=[w.copy()])
    while True:
        allowed = [i for i in np.flatnonzero(alive).tolist() if nm is None or _group(alive, i, nm[1]).sum() > nm[0]]
        if not allowed:
            assert order is None or len(order) == len(out.order)
            return out
        A = np.flatnonzero(alive)
        H = np.linalg.inv(F[np.ix_(A, A)])
        loss = {i: w[i] ** 2 / (2 * H[j, j]) for j, i in enumerate(A.tolist())}
        best = min(allowed, key=loss.__getitem__)
        p = best if order is None else order[len(out.order)]
        assert p in allowed
        j = A.tolist().index(p)
        out.order.append(p)
        out.losses.append(loss[p])
        out.least.append(loss[best])
        w[A] -= w[p] / H[j, j] * H[:, j]
        w[p] = 0.0
        alive[p] = False
        out.weights.append(w.copy())


def best_weights(fisher: np.ndarray, weights: np.ndarray, kept: np.ndarray, damp: float) -> np.ndarray:
    """The minimiser of equation 4 with the set of kept weights given."""
    F = np.asarray(fisher, dtype=np.float64) + damp * np.eye(len(weights))
    w = np.asarray(weights, dtype=np.float64)
    S, Q = np.flatnonzero(kept), np.flatnonzero(~np.asarray(kept))
    out = np.zeros_like(w)
    if len(S):
        out[S] = w[S] + np.linalg.solve(F[np.ix_(S, S)], F[np.ix_(S, Q)] @ w[Q])
    return out


def _group(values: np.ndarray, index: int, size: int) -> np.ndarray:
    return values[index // size * size :][:size]
