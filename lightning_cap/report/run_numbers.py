"""What the records of a run say together: the value before pruning, drops, FLOPs saved, losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lightning_cap.report.csv_metrics import Curve
from lightning_cap.report.run_folder import Run
from lightning_cap.report.texts import is_share
from lightning_cap.trainer.records import EventRecord
from lightning_cap.trainer.run_records import CycleRecord, LayerRecord, less_is_better


@dataclass(frozen=True)
class Losses:
    """The increase of the loss by one event: predicted, and measured in validation; None where it is not known."""

    event: EventRecord
    predicted: float | None
    measured: float | None


class RunNumbers:
    """The numbers of a run.

    Args:
        run: Its records.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def metric(self) -> str | None:
        """Name of the metric to show: that of the table of cycles, else a validation accuracy, else any; None if there is none."""
        named = [start.metric for start in reversed(self.run.starts) if start.metric]
        if named:
            return named[0]
        names = {name for event in self.run.events for name in event.after}
        return min(names, key=lambda n: ("acc" not in n.lower(), "val" not in n.lower(), len(n), n), default=None)

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less of it is."""
        if self.run.start is not None and self.run.start.metric:
            return -1 if self.run.start.mode == "min" else 1
        return -1 if self.metric is not None and less_is_better(self.metric) else 1

    @property
    def factor(self) -> float:
        """That plots multiply the metric by."""
        return 100.0 if self.metric is not None and is_share(self.metric) else 1.0

    @property
    def change_name(self) -> str:
        """What is told of how the metric gets worse."""
        return "drop" if self.sign > 0 else "rise"

    @cached_property
    def dense(self) -> float | None:
        """The metric before the first event; None if it is not known."""
        before = [cycle.value for cycle in self.run.cycles if cycle.goal == 0 and cycle.sparsity == 0]
        if before and before[0] is not None:
            return before[0]
        first = next(iter(self.run.events), None)
        return None if first is None or self.metric is None else first.before.get(self.metric)

    def drop(self, value: float | None, start: float | None = None) -> float | None:
        """How much worse a value is than the dense one, or than ``start``; None where one of them is not known."""
        start = self.dense if start is None else start
        return None if value is None or start is None else self.sign * (start - value)

    @cached_property
    def cycles(self) -> list[CycleRecord]:
        """Those after events."""
        return [cycle for cycle in self.run.cycles if cycle.goal > 0]

    def event_of(self, cycle: CycleRecord) -> EventRecord | None:
        """The event that a cycle begins with."""
        begun = [event for event in self.run.events if event.goal == cycle.goal and event.epoch <= cycle.epochs]
        return begun[-1] if begun else None

    @cached_property
    def layers(self) -> Sequence[LayerRecord]:
        """Those that the last start has told of; else the targets that events name."""
        told = next((start.layers for start in reversed(self.run.starts) if start.layers), ())
        if told or not self.run.events:
            return told
        return [LayerRecord(name, ()) for name in self.run.events[-1].sparsities]

    @property
    def flops(self) -> int | None:
        """Of the model on one example."""
        return next((start.flops for start in reversed(self.run.starts) if start.flops is not None), None)

    def flops_saved(self, sparsities: Mapping[str, float] | None) -> float | None:
        """Share of the model's FLOPs that zeros save; None where they were not counted."""
        if not sparsities or not self.flops or any(layer.flops is None for layer in self.layers):
            return None
        return sum((layer.flops or 0) * sparsities.get(layer.name, 0.0) for layer in self.layers) / self.flops

    def saved_by(self, cycle: CycleRecord) -> float | None:
        """Share of the FLOPs that a cycle's model saves."""
        if cycle.saving is not None and cycle.saving.cost == "flops":
            return cycle.saving.share
        event = self.event_of(cycle)
        return None if event is None else self.flops_saved(event.sparsities)

    @cached_property
    def relative_drops(self) -> list[tuple[int, float, float]]:
        """Of each event its epoch, its goal and the drop of the metric over its value before."""
        found = []
        for event in self.run.events:
            before, after = (
                None if self.metric is None else told.get(self.metric) for told in (event.before, event.after)
            )
            if before and after is not None and math.isfinite(before) and math.isfinite(after):
                found.append((event.epoch, event.goal, self.sign * (before - after) / abs(before)))
        return found

    @cached_property
    def loss_name(self) -> str | None:
        """The loss that is measured in validation, right before and after events."""
        names = {name for event in self.run.events for name in event.before if "loss" in name.lower()}
        return min(names, key=lambda name: ("val" not in name.lower(), len(name), name), default=None)

    @cached_property
    def losses(self) -> list[Losses]:
        """Of each event."""
        found = []
        for event in self.run.events:
            before, after = (
                None if self.loss_name is None else told.get(self.loss_name) for told in (event.before, event.after)
            )
            measured = None if before is None or after is None else after - before
            found.append(Losses(event, event.predicted_loss, measured))
        return found

    @property
    def end(self) -> float:
        """Epochs trained so far, as far as is known."""
        known = [float(cycle.epochs) for cycle in self.run.cycles] + [float(event.epoch) for event in self.run.events]
        if self.run.metrics is not None:
            known += [x for name in self.run.metrics.columns for x, _ in self.run.metrics.curve(name)[-1:]]
        if self.run.start is not None:
            known.append(float(self.run.start.epoch))
        return max(known, default=0.0)

    @cached_property
    def sparsity_curve(self) -> Curve:
        """What goals count over epochs, from the first to the last that is known."""
        first = self.run.starts[0].epoch if self.run.starts else 0
        points = [(float(min([first, *(event.epoch for event in self.run.events)])), 0.0)]
        points += [
            (float(event.epoch), event.sparsity if event.saving is None else event.saving.share)
            for event in self.run.events
        ]
        return [*points, (max(self.end, points[-1][0]), points[-1][1])]
