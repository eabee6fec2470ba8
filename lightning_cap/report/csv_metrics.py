"""Reads what Lightning's CSV logger has written down: metrics over epochs."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_cap.errors import DataError

METRICS = "metrics.csv"

#: Points of a curve: epochs trained, as a fraction where it is inside one, and the value.
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Metrics:
    """The lines of a ``metrics.csv``.

    Attributes:
        columns: Their names.
        rows: Numbers by the names of their columns; what is empty is not there.
        torn: Whether the last line was cut off, as after a kill, and is left out.
    """

    columns: Sequence[str]
    rows: Sequence[dict[str, float]]
    torn: bool = False

    def curve(self, name: str, before: bool = False) -> Curve:
        """A metric over epochs; empty if it was never logged.

        Args:
            name: Of the column.
            before: Whether it was logged before its step, as learning rates are, and not after it.
        """
        per_epoch = self._steps_per_epoch()
        if per_epoch is None:
            return []
        done = 0 if before else 1
        return [((row["step"] + done) / per_epoch, row[name]) for row in self.rows if name in row and "step" in row]

    def learning_rates(self) -> dict[str, Curve]:
        """Those that LearningRateMonitor has logged, by name, without those that are equal to one before."""
        found: dict[str, Curve] = {}
        for name in self.columns:
            if name.startswith("lr-") and not name.endswith(("-momentum", "-weight_decay")):
                curve = self.curve(name, before=True)
                if curve and curve not in found.values():
                    found[name] = curve
        return found

    def _steps_per_epoch(self) -> float | None:
        """The last step of an epoch tells it; every other line tells less."""
        known = [(row["step"] + 1) / (row["epoch"] + 1) for row in self.rows if "step" in row and "epoch" in row]
        return max(known, default=None)


def read_metrics(path: Path) -> Metrics:
    """The lines of a ``metrics.csv``, which may still be written to.

    Raises:
        DataError: It cannot be read, or is not the CSV logger's.
    """
    remedy = "Give the folder of a run with CSVLogger, or move that file away."
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: it cannot be read ({error}). {remedy}") from error
    whole, end, rest = text.rpartition("\n")
    lines = list(csv.reader(whole.splitlines())) if end else []
    if not lines:
        return Metrics((), (), torn=bool(rest))
    columns = lines[0]
    if "step" not in columns or len(set(columns)) < len(columns):
        raise DataError(f"{path}, line 1: it has no column 'step', so it is not the CSV logger's. {remedy}")
    rows = []
    for place, line in enumerate(lines[1:], 2):
        if line and len(line) != len(columns):
            raise DataError(f"{path}, line {place}: {len(line)} values for {len(columns)} columns. {remedy}")
        rows.append(
            {name: value for name, text in zip(columns, line, strict=False) if (value := _number(text)) is not None}
        )
    return Metrics(columns, [row for row in rows if row], torn=bool(rest))


def _number(text: str) -> float | None:
    """Of a cell; None where it is empty or holds no number."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
