"""The record of a pruning event, one line of ``events.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lightning_cap.utilities.records import Record

EVENTS = "events.jsonl"


@dataclass(frozen=True)
class Saving:
    """How much is saved of what the goals of a run count, where that is not zeros.

    Attributes:
        cost: Its name, such as ``"flops"``.
        share: Saved, over the whole.
        price: Of the model with the units that are kept, as the cost predicts it.
        unit: Of ``price``, such as ``"ms"``.
    """

    cost: str
    share: float
    price: float
    unit: str

    @property
    def left(self) -> str:
        """The price, such as ``12.3 ms`` or ``1.26 G FLOPs``."""
        return self._shown(self.price)

    @property
    def whole(self) -> str:
        """The price of the model with all units, likewise."""
        return self._shown(self.price / (1 - self.share))

    def _shown(self, price: float) -> str:
        sizes = [(size, letter) for size, letter in ((1e9, "G "), (1e6, "M "), (1e3, "k ")) if price >= size]
        size, letter = sizes[0] if sizes else (1.0, "")
        return f"{price / size:.3g} {letter}{self.unit}"


@dataclass(frozen=True, kw_only=True)
class EventRecord(Record):
    """What a pruning event did.

    Attributes:
        epoch: At whose start it took place, from 0; the number of epochs for an event at the end of training.
        goal: Sparsity to reach, or share to save of what else goals count.
        sparsity: Of all targets, after the event.
        saving: What is saved after the event; None where goals count zeros.
        predicted_loss: Predicted increase of the loss, summed over recomputations; None where the pruner predicts none.
        unit: What was collected: ``"gradients"`` or ``"inputs"``.
        samples: How many of them were used, in all.
        skipped: How many were left out as not finite.
        healed_samples: That healing has read; 0 without healing.
        recalibration_samples: That the statistics of batch norm were estimated from; 0 where they were not.
        grown_back: Weights that grew back.
        peak_bytes: Planned peak extra memory on the device of the weights, without healing.
        measured_bytes: Peak extra memory there as measured, of the process that took most; None where it cannot be measured. See
            `lightning_cap.utilities.peak_memory.watch_peak` for what is in it.
        seconds: Seconds per phase: plan, collect, solve, apply; heal and recalibrate, where there were any.
        stats: The pruner's own numbers, of the last recomputation.
        before: Validation metrics right before the event.
        after: Validation metrics right after it.
        sparsities: Sparsity per target, after the event.
    """

    kind: ClassVar[str] = "event"
    version: ClassVar[int] = 5

    epoch: int
    goal: float
    sparsity: float
    saving: Saving | None = None
    predicted_loss: float | None
    unit: str
    samples: int
    skipped: int
    healed_samples: int = 0
    recalibration_samples: int = 0
    grown_back: int
    peak_bytes: int
    measured_bytes: int | None
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
            "healed_samples": self.healed_samples or None,
            "recalibration_samples": self.recalibration_samples or None,
            "grown_back": self.grown_back,
            "peak_bytes": self.peak_bytes,
            "measured_bytes": self.measured_bytes,
            **self.stats,
            **_under("seconds", self.seconds),
            **_under("before", self.before),
            **_under("after", self.after),
            **_under("layer_sparsity", self.sparsities),
        }
        if self.saving is not None:
            flat |= {self.saving.cost: self.saving.share, f"predicted_{self.saving.cost}": self.saving.price}
        return {f"cap/{name}": float(value) for name, value in flat.items() if value is not None}


def _under(prefix: str, entries: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in entries.items()}
