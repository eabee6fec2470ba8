"""Reads the rows of a comparison: which metric to show, means and deviations over seeds, who has which row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

#: One line of ``results.json``, see `lightning_cap.comparison.compare`.
Row = Mapping[str, Any]


def accuracy_name(rows: Sequence[Row]) -> str | None:
    """The metric to show: a validation accuracy, else any accuracy, else the first that is logged."""
    names = list(rows[0]["metrics"])
    return min(names, key=lambda n: ("acc" not in n.lower(), "val" not in n.lower(), len(n)), default=None)


def dense_row(rows: Sequence[Row]) -> Row | None:
    """The unpruned model's."""
    return next((row for row in rows if row["pruner"] == "dense"), None)


def plain_rows(rows: Sequence[Row]) -> list[Row]:
    """Those of the pruners as given, without the grids' and the dense model's."""
    return [row for row in rows if row["pruner"] != "dense" and row["grid"] is None]


def by_label(rows: Sequence[Row]) -> dict[str, dict[float, list[Row]]]:
    """``{label: {target sparsity: rows of the seeds}}``, rising sparsities, without the dense model's."""
    found: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        if row["pruner"] != "dense":
            found.setdefault(row["label"], {}).setdefault(row["target"], []).append(row)
    return {label: dict(sorted(targets.items())) for label, targets in found.items()}


def first_seed(rows: Sequence[Row]) -> list[Row]:
    """Of each label and sparsity the first row."""
    return [seeds[0] for targets in by_label(rows).values() for seeds in targets.values()]


def targets_of(rows: Sequence[Row]) -> list[float]:
    """The sparsities that were asked for, rising."""
    return sorted({row["target"] for row in rows if row["pruner"] != "dense"})


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (0 for one value) of what is known, None if nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def metric_values(rows: Sequence[Row], name: str | None) -> list[float | None]:
    """A metric of each row."""
    return [row["metrics"].get(name) for row in rows]


def percent(sparsity: float) -> str:
    """``0.75`` -> ``75 %``."""
    return f"{100 * sparsity:.4g} %"


def number_first(value: Any) -> tuple[float, str]:
    """A key that sorts numbers by size, and then whatever else there is."""
    return (float(value), "") if isinstance(value, (int, float)) else (math.inf, str(value))
