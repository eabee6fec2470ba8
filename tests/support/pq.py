"""The PQ index and pruning by it, as equations over Python's floats (Diao et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def index(values: Sequence[float], p: float, q: float) -> float:
    """Definition 1."""
    low, high = (sum(abs(value) ** power for value in values) ** (1 / power) for power in (p, q))
    return 1 - len(values) ** (1 / q - 1 / p) * low / high


def bound(values: Sequence[float], p: float, q: float, eta: float) -> float:
    """Theorem 2: the least of the largest values that hold all but a share of the sum."""
    return len(values) * (1 + eta) ** (-q / (q - p)) * (1 - index(values, p, q)) ** (p * q / (q - p))


def sparsity_after(left: Sequence[float], total: int, settings: Mapping[str, float]) -> float:
    """Algorithm 1: the sparsity after an event, of the weights that are left before it, out of ``total``."""
    s = {"p": 0.5, "q": 1.0, "eta": 0.0, "gamma": 1.0, "beta": 0.9, "max_sparsity": 0.95, **settings}
    ratio = bound(left, s["p"], s["q"], s["eta"]) / len(left)
    zeros = total - len(left) + math.floor(len(left) * min(s["gamma"] * (1 - ratio), s["beta"]))
    return zeros / total if zeros < math.floor(s["max_sparsity"] * total + 0.5) else s["max_sparsity"]
