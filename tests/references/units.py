"""Float64 NumPy re-computations for pruners of units: the inverse is recomputed after every removal.

Slow on purpose and written without a look at the package: they decide what is right.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np


def gate_fisher(rows: np.ndarray, kept: np.ndarray, damp: float) -> np.ndarray:
    """``F = 1/N Σ g gᵀ``, and ``damp`` times the mean diagonal of what is kept on the diagonal. ``rows`` is ``(N, size)``."""
    fisher = rows.T @ rows / len(rows)
    return fisher + damp * fisher.diagonal()[kept].mean() * np.eye(len(fisher))


def best_gates(fisher: np.ndarray, kept: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """What ``½ (q - 1)ᵀ F (q - 1)`` is least for, with ``q`` zero where pruned and 1 where a unit was not there."""
    free = np.flatnonzero(kept & ~pruned)
    gone = np.flatnonzero(pruned)
    gates = np.where(pruned, 0.0, 1.0)
    gates[free] += np.linalg.solve(fisher[np.ix_(free, free)], fisher[np.ix_(free, gone)].sum(1)) if len(gone) else 0.0
    return gates


def gate_loss(fisher: np.ndarray, kept: np.ndarray, pruned: np.ndarray) -> float:
    """``½ (q - 1)ᵀ F (q - 1)`` at the best gates."""
    move = best_gates(fisher, kept, pruned) - 1
    return float(0.5 * move @ fisher @ move)


def eliminate_gates(fisher: np.ndarray, kept: np.ndarray) -> tuple[list[int], list[float]]:
    """One at a time, the one that costs least at the best values of all others."""
    pruned = np.zeros_like(kept)
    order: list[int] = []
    losses: list[float] = []
    while (kept & ~pruned).any():
        before = gate_loss(fisher, kept, pruned)
        costs = {}
        for unit in np.flatnonzero(kept & ~pruned):
            with_it = pruned.copy()
            with_it[unit] = True
            costs[int(unit)] = gate_loss(fisher, kept, with_it) - before
        best = min(costs, key=lambda unit: costs[unit])
        order.append(best)
        losses.append(costs[best])
        pruned[best] = True
    return order, losses


def least_prefixes(
    losses: Mapping[str, Sequence[float]], prices: Mapping[str, float], saving: float
) -> tuple[float, dict[str, int]]:
    """Of all ways to cut each group at a prefix that save enough, the one of least loss."""
    names = list(losses)
    best: tuple[float, dict[str, int]] = (np.inf, {})
    for lengths in itertools.product(*(range(len(losses[name])) for name in names)):  # one unit is left
        if sum(prices[name] * n for name, n in zip(names, lengths, strict=True)) < saving:
            continue
        loss = sum(sum(losses[name][:n]) for name, n in zip(names, lengths, strict=True))
        if loss < best[0]:
            best = loss, dict(zip(names, lengths, strict=True))
    return best
