"""A histogram of what an event ranked its weights by, small enough to log."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_cap.utilities import distributed

SAMPLE = 2**20  # scores that a histogram is of, at the most, on each process
_BINS = 64


@dataclass(frozen=True)
class ScoreHistogram:
    """Decimal logarithms of scores, of all processes.

    Attributes:
        low: Where the first bin begins.
        high: Where the last one ends.
        counts: Scores in each of the bins, which are equally wide.
    """

    low: float
    high: float
    counts: tuple[int, ...]

    @property
    def edges(self) -> tuple[float, ...]:
        """Of the bins, one more than there are."""
        width = (self.high - self.low) / len(self.counts)
        return (*(self.low + i * width for i in range(len(self.counts))), self.high)


def histogram(scores: Tensor | None) -> ScoreHistogram | None:
    """The histogram of positive scores, of all processes together. Every process must call it.

    Args:
        scores: ``(n,)`` of this process, on any device; None for none.

    Returns:
        None if no process has a positive score.
    """
    own = torch.empty(0) if scores is None else scores.float()
    logs = own[(own > 0) & own.isfinite()].log10()
    ends = (float(logs.min()), float(logs.max())) if len(logs) else (math.inf, -math.inf)
    lows, highs = zip(*distributed.gather_objects(ends), strict=True)
    low, high = min(lows), max(highs)
    if low > high:
        return None
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(logs, _BINS, low, high).long().tolist()
    together = zip(*distributed.gather_objects(counts), strict=True)
    return ScoreHistogram(low, high, tuple(sum(parts) for parts in together))
