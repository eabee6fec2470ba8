"""The textbook algorithm in float64 NumPy: one weight at a time, the inverse recomputed after every removal.

Slow on purpose and written without a look at the package: it decides what is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Reference:
    order: list[int]
    losses: list[float]
    weights: list[np.ndarray]  # after 0, 1, 2, ... removals


def obs_block(fisher: np.ndarray, weights: np.ndarray, alive: np.ndarray, damp: float, nm: tuple[int, int] | None = None) -> Reference:
    """Optimal Brain Surgeon on one block (equation 2); ``nm = (n, m)`` keeps at most n of every m."""
    F = np.asarray(fisher, dtype=np.float64) + damp * np.eye(len(weights))
    w = np.where(alive, np.asarray(weights, dtype=np.float64), 0.0)
    alive = np.array(alive, dtype=bool)
    out = Reference([], [], [w.copy()])
    while True:
        allowed = [i for i in range(len(w)) if alive[i] and (nm is None or alive[i // nm[1] * nm[1] :][: nm[1]].sum() > nm[0])]
        if not allowed:
            return out
        A = np.flatnonzero(alive)
        H = np.linalg.inv(F[np.ix_(A, A)])
        where = {a: j for j, a in enumerate(A)}
        p = min(allowed, key=lambda i: w[i] ** 2 / H[where[i], where[i]])
        j = where[p]
        out.order.append(p)
        out.losses.append(w[p] ** 2 / (2 * H[j, j]))
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
