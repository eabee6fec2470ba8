"""Float64 NumPy re-computation for layer-wise pruning of units: a fit after every removal.

Slow on purpose and written without a look at the package: it decides what is right.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def fit_error(weight: np.ndarray, inputs: np.ndarray, gone: np.ndarray, damp: float) -> float:
    """``min ‖(W - W') X‖² + λ ‖W - W'‖²`` over ``W'`` without the columns ``gone``: ``weight (O, n)``, ``inputs (N, n)``.

    ``λ`` is ``damp`` times the mean of ``‖x_i‖²``.
    """
    ridge = np.sqrt(damp * np.square(inputs).sum(0).mean())
    rows = np.concatenate([inputs, ridge * np.eye(inputs.shape[1])])
    lost = rows[:, gone] @ weight[:, gone].T
    free = ~gone
    if not free.any():
        return float(np.square(lost).sum())
    found, *_ = np.linalg.lstsq(rows[:, free], lost, rcond=None)
    return float(np.square(lost - rows[:, free] @ found).sum())


def eliminate_columns(
    readers: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], size: int, damp: float
) -> tuple[list[int], list[float]]:
    """Units one at a time by what they add to the error of their readers after a fit, relative to the reader's outputs.

    Args:
        readers: Of each its weight ``(O, n)``, its inputs ``(N, n)`` and the unit of each column, ``(n,)``.
        size: Number of units.
        damp: See `fit_error`.
    """

    def error(pruned: list[int]) -> float:
        total = 0.0
        for weight, inputs, unit in readers:
            total += fit_error(weight, inputs, np.isin(unit, pruned), damp) / np.square(inputs @ weight.T).sum()
        return total

    order: list[int] = []
    losses: list[float] = []
    while len(order) < size:
        costs = {u: error([*order, u]) - error(order) for u in range(size) if u not in order}
        best = min(costs, key=lambda u: costs[u])
        order.append(best)
        losses.append(costs[best])
    return order, losses
