"""The record of a pruning event, one line of ``events.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lightning_cap.utilities.records import Record

EVENTS = "events.jsonl"


@dataclass(frozen=True, kw_only=True)
class EventRecord(Record):
    """What a pruning event did.

    Attributes:
        epoch: At whose start it took place, from 0; the number of epochs for an event at the end of training.
        goal: Sparsity to reach.
        sparsity: Of all targets, after the event.
        predicted_loss: Predicted increase of the loss, summed over recomputations; None where the pruner predicts none.
        unit: What was collected: ``"gradients"`` or ``"inputs"``.
        samples: How many of them were used, in all.
        skipped: How many were left out as not finite.
        grown_back: Weights that grew back.
        peak_bytes: Planned peak extra memory on the device of the weights.
        seconds: Seconds per phase: plan, collect, solve, apply.
        stats: The pruner's own numbers, of the last recomputation.
        before: Validation metrics right before the event.
        after: Validation metrics right after it.
        sparsities: Sparsity per target, after the event.
    """

    kind: ClassVar[str] = "event"
    version: ClassVar[int] = 2

    epoch: int
    goal: float
    sparsity: float
    predicted_loss: float | None
    unit: str
    samples: int
    skipped: int
    grown_back: int
    peak_bytes: int
    seconds: Mapping[str, float]
    stats: Mapping[str, float]
    before: Mapping[str, float]
    after: Mapping[str, float]
    sparsities: Mapping[str, float]

    def logged(self) -> dict[str, float]:
        """What loggers are given, such as ``cap/predicted_loss``, ``cap/seconds/solve`` and ``cap/after/val_acc``."""
        flat: dict[str, float | None] = {
            "sparsity": self.sparsity,
            "predicted_loss": self.predicted_loss,
            self.unit: self.samples,
            f"{self.unit}_skipped": self.skipped,
            "grown_back": self.grown_back,
            "peak_bytes": self.peak_bytes,
            **self.stats,
            **_under("seconds", self.seconds),
            **_under("before", self.before),
            **_under("after", self.after),
            **_under("sparsity", self.sparsities),
        }
        return {f"cap/{name}": float(value) for name, value in flat.items() if value is not None}


def _under(prefix: str, entries: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in entries.items()}
