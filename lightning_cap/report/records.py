"""Reads the records of a comparison: which metric to show, means and deviations over seeds, who has which record."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from lightning_cap.comparison.records import UNPRUNED, ComparisonRecord
from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import shown

Records = Sequence[ComparisonRecord]


def require_records(records: object) -> None:
    """Refuse what is no list of the records of a comparison.

    Raises:
        ConfigError: It is something else, or empty.
    """
    if not isinstance(records, Sequence) or not records or not all(isinstance(r, ComparisonRecord) for r in records):
        raise ConfigError(
            f"records={shown(records)}: give the records of a comparison, which compare() returns and read_records reads."
        )


def accuracy_name(records: Records) -> str | None:
    """The metric to show: a validation accuracy, else any accuracy, else the first that is logged."""
    names = list(records[0].metrics)
    return min(names, key=lambda n: ("acc" not in n.lower(), "val" not in n.lower(), len(n)), default=None)


def unpruned_record(records: Records) -> ComparisonRecord | None:
    """The unpruned model's."""
    return next((record for record in records if record.pruner == UNPRUNED), None)


def as_given(records: Records) -> list[ComparisonRecord]:
    """Those of the pruners as given, without the grids' and the unpruned model's."""
    return [record for record in records if record.pruner != UNPRUNED and record.grid is None]


def by_label(records: Records) -> dict[str, dict[float, list[ComparisonRecord]]]:
    """``{label: {goal: records of the seeds}}``, rising goals, without the unpruned model's."""
    found: dict[str, dict[float, list[ComparisonRecord]]] = {}
    for record in records:
        if record.pruner != UNPRUNED:
            found.setdefault(record.label, {}).setdefault(record.goal, []).append(record)
    return {label: dict(sorted(goals.items())) for label, goals in found.items()}


def first_seed(records: Records) -> list[ComparisonRecord]:
    """The first record of each label and goal."""
    return [seeds[0] for goals in by_label(records).values() for seeds in goals.values()]


def goals_of(records: Records) -> list[float]:
    """The sparsities, or other goals, that were asked for, rising."""
    return sorted({record.goal for record in records if record.pruner != UNPRUNED})


def counted(records: Records) -> str:
    """What the goals count, in words: ``"sparsity"``, ``"saving of flops"``, or ``"goal"`` where pruners count different things."""
    names = {record.counted for record in records if record.pruner != UNPRUNED}
    if len(names) > 1:
        return "goal"
    return "sparsity" if names <= {"sparsity"} else f"saving of {names.pop()}"


def grid_settings(records: Records) -> list[str]:
    """The settings that there are grids over."""
    return list(dict.fromkeys(record.grid.setting for record in records if record.grid is not None))


def in_grid(records: Records, setting: str) -> list[ComparisonRecord]:
    """Those of the grid over a setting, without those of the pruners as given."""
    return [record for record in records if record.grid is not None and record.grid.setting == setting]


def value_of(record: ComparisonRecord, setting: str) -> Any:
    """The value of a setting; ``"as given"`` for a pruner as given where that is no plain value."""
    return record.parameters.get(setting, "as given")


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (0 for one value) of what is known, None if nothing is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def metric_values(records: Records, name: str | None) -> list[float | None]:
    """A metric of each record."""
    return [None if name is None else record.metrics.get(name) for record in records]


def percent(sparsity: float) -> str:
    """``0.75`` -> ``75 %``."""
    return f"{100 * sparsity:.4g} %"


def number_first(value: Any) -> tuple[float, str]:
    """A key that sorts numbers by size, and then whatever else there is."""
    return (float(value), "") if isinstance(value, (int, float)) else (math.inf, str(value))
