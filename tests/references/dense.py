"""Float64 NumPy re-computations with dense inverses, of the pruners that are not one-at-a-time elimination.

Slow on purpose and written without a look at the package: they decide what is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def matrix_of(rows: Sequence[Mapping[str, Tensor]], name: str) -> np.ndarray:
    """``(N, d)``: a target's gradient rows."""
    return np.concatenate([chunk[name].double().flatten(1).numpy() for chunk in rows])


def damped_fisher(rows: np.ndarray, damp: float) -> np.ndarray:
    return rows.T @ rows / len(rows) + damp * np.eye(rows.shape[1])


def cuts(total: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, total)) for first in range(0, total, size))


def alive_inverse(fisher: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """The inverse of the alive part, zero elsewhere."""
    A = np.flatnonzero(alive)
    out = np.zeros_like(fisher)
    out[np.ix_(A, A)] = np.linalg.inv(fisher[np.ix_(A, A)])
    return out


def saliencies(inverse: np.ndarray, w: np.ndarray, alive: np.ndarray, group: int = 1) -> np.ndarray:
    """What it costs to remove each group: ``1/2 w_g^T (H_gg)^-1 w_g``; infinite where nothing is left."""
    out = []
    for part in cuts(len(w), group):
        g = np.flatnonzero(alive[part]) + part.start
        out.append(0.5 * w[g] @ np.linalg.solve(inverse[np.ix_(g, g)], w[g]) if len(g) else np.inf)
    return np.array(out)


def joint_update(inverse: np.ndarray, w: np.ndarray, alive: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """Equation 5 with all removed weights together."""
    Q = np.flatnonzero(gone)
    moved = w - inverse[:, Q] @ np.linalg.solve(inverse[np.ix_(Q, Q)], w[Q]) if len(Q) else w.copy()
    return np.where(alive & ~gone, moved, 0.0)


def simple_update(
    inverse: np.ndarray, w: np.ndarray, alive: np.ndarray, gone: np.ndarray, group: int = 1
) -> np.ndarray:
    """Every removed group's own update on the dense block, added up."""
    moved = w.copy()
    for part in cuts(len(w), group):
        g = np.flatnonzero(gone[part]) + part.start
        if len(g):
            moved -= inverse[:, g] @ np.linalg.solve(inverse[np.ix_(g, g)], w[g])
    return np.where(alive & ~gone, moved, 0.0)


def obs_groups(
    fisher: np.ndarray, w: np.ndarray, alive: np.ndarray, size: int, order: Sequence[int] | None = None
) -> tuple[list[int], list[float], list[float]]:
    """Remove whole groups one at a time, least loss a weight first; the inverse is recomputed after every one.

    Returns the order of groups, what each removal cost, and the gap in loss a weight to the runner-up (relative).
    ``order`` replays somebody else's.
    """
    w, alive = np.where(alive, w, 0.0), alive.copy()
    removed: list[int] = []
    losses: list[float] = []
    gaps: list[float] = []
    while alive.any():
        inverse = alive_inverse(fisher, alive)
        costs = saliencies(inverse, w, alive, size)
        members = alive.reshape(-1, size).sum(-1)
        each = costs / np.maximum(members, 1)
        g = int(each.argmin()) if order is None else order[len(removed)]
        runner_up = np.sort(each)[1] if np.isfinite(each).sum() > 1 else np.inf
        gaps.append((runner_up - each.min()) / max(each.min(), 1e-30))
        gone = np.zeros_like(alive)
        gone[g * size : (g + 1) * size] = alive[g * size : (g + 1) * size]
        w = joint_update(inverse, w, alive, gone)
        alive &= ~gone
        removed.append(g)
        losses.append(float(costs[g]))
    return removed, losses, gaps


def right_sweep(fisher: np.ndarray, w: np.ndarray, choose: Any, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Column by column, removed weights moved onto the columns to their right alone: ``w`` is ``(K, B)``.

    Args:
        fisher: ``(B, B)`` with damp, or one for each row, ``(K, B, B)``.
        w: ``(K, B)``.
        choose: ``choose(slice, weights (K, c), pivots (K, c))`` -> which of a batch of columns go, ``(K, c)`` bool.
        columns: In a batch.

    Returns:
        The weights and what went.
    """
    w, B = w.copy(), w.shape[1]
    fisher = np.broadcast_to(fisher, (len(w), B, B))
    rest = [np.linalg.inv(fisher[:, j:, j:]) for j in range(B)]
    gone = np.zeros(w.shape, dtype=bool)
    for part in cuts(B, columns):
        pivots = np.stack([rest[j][:, 0, 0] for j in range(part.start, part.stop)], axis=1)
        gone[:, part] = choose(part, w[:, part].copy(), pivots)
        for j in range(part.start, part.stop):
            for k in np.flatnonzero(gone[:, j]):
                w[k, j:] -= w[k, j] / rest[j][k, 0, 0] * rest[j][k, :, 0]
                w[k, j] = 0.0
    return w, gone


def least_mask(scores: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` least of all entries."""
    out = np.zeros(scores.size, dtype=bool)
    out[np.argsort(scores, axis=None, kind="stable")[:count]] = True
    return out.reshape(scores.shape)


def least_in_groups(scores: np.ndarray, alive: np.ndarray, kept: int, size: int) -> np.ndarray:
    """The least alive ones of every group, until ``kept`` are left."""
    gone = np.zeros(scores.shape, dtype=bool)
    for part in cuts(scores.size, size):
        left = [i for i in range(part.start, part.stop) if alive.flat[i]]
        for i in sorted(left, key=lambda i: scores.flat[i])[: max(0, len(left) - kept)]:
            gone.flat[i] = True
    return gone
