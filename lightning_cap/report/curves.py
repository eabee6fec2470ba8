"""Curves of a comparison: accuracy over sparsity, predicted against measured loss, accuracy over one setting."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_cap.comparison.records import ComparisonRecord
from lightning_cap.report.records import (
    Records,
    accuracy_name,
    as_given,
    by_label,
    goals_of,
    in_grid,
    mean_and_deviation,
    metric_values,
    number_first,
    percent,
    unpruned_record,
    value_of,
)
from lightning_cap.report.style import grid, legend, panels, save, styles


def plot_accuracy(records: Records, path: Path) -> None:
    """Accuracy (or the first metric) over sparsity, a line for each pruner, with the deviation over seeds (figures 3, 7, 8).

    Args:
        records: What `lightning_cap.comparison.compare` returned.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
    """
    name, unpruned, found = accuracy_name(records), unpruned_record(records), by_label(as_given(records))
    looks = styles(list(found))
    figure, (axes,) = panels(1, 5.2, 3.8)
    if unpruned is not None and name is not None:
        axes.axhline(unpruned.metrics[name], color="0.5", linewidth=1, linestyle=(0, (4, 3)), label=unpruned.label)
    for label, goals in found.items():
        points = [
            (100 * seeds[0].sparsity, value)
            for seeds in goals.values()
            if (value := mean_and_deviation(metric_values(seeds, name))) is not None
        ]
        _line(axes, [x for x, _ in points], [value for _, value in points], label, looks[label])
    axes.set_xlabel("sparsity (%)")
    axes.set_ylabel(name or "no metric")
    grid(axes)
    legend(figure, axes)
    save(figure, path)


def _line(axes: Any, x: Sequence[Any], values: Sequence[tuple[float, float]], label: str, look: dict[str, Any]) -> None:
    """A line through means, with a band of the deviation."""
    mean = [value[0] for value in values]
    axes.plot(x, mean, label=label, **look)
    if any(value[1] for value in values):
        low, high = [m - s for m, s in values], [m + s for m, s in values]
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


def plot_losses(records: Records, path: Path) -> bool:
    """The measured increase of the loss over the predicted one, for each pruner that predicts it; a point for each record.

    Measured on calibration samples where that is known, else on the validation data.

    Args:
        records: What `lightning_cap.comparison.compare` returned.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.

    Returns:
        Whether there was anything to draw.
    """
    predicting = [record for record in as_given(records) if record.predicted_loss is not None]
    kind = "calibration" if any(r.loss_increase.get("calibration") is not None for r in predicting) else "validation"
    known = [record for record in predicting if record.loss_increase.get(kind) is not None]
    shown = [record for record in known if all(0 < value < math.inf for value in _increases(record, kind))]
    if not shown:
        return False
    looks = styles(list(by_label(as_given(records))))
    figure, (axes,) = panels(1, 5.0, 4.2)
    for label, goals in by_label(shown).items():
        found = [record for seeds in goals.values() for record in seeds]
        points = [_increases(record, kind) for record in found]
        axes.plot(*zip(*points, strict=True), label=label, **{**looks[label], "linestyle": "none"}, alpha=0.85)
        for seed in {record.seed for record in found}:
            line = [_increases(record, kind) for record in found if record.seed == seed]
            axes.plot(*zip(*line, strict=True), color=looks[label]["color"], linewidth=0.8, alpha=0.5)
    values = [value for record in shown for value in _increases(record, kind)]
    ends = [(min(values), min(values)), (max(values), max(values))]
    axes.plot(*zip(*ends, strict=True), color="0.5", linewidth=1, linestyle=(0, (4, 3)), label="equal")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("predicted increase of the loss")
    axes.set_ylabel(f"measured increase ({kind} data)")
    axes.set_title(_left_out(records, known, shown), fontsize=8, color="0.35")
    grid(axes)
    legend(figure, axes)
    save(figure, path)
    return True


def _left_out(records: Records, known: Records, shown: Records) -> str:
    """What the figure of losses does not show, in words; empty if there is nothing."""
    silent = list(by_label([record for record in as_given(records) if record.predicted_loss is None]))
    notes = [f"no loss predicted by: {', '.join(silent)}"] if silent else []
    if len(shown) < len(known):
        notes.append(f"{len(known) - len(shown)} of {len(known)} have no increase to show")
    return textwrap.fill("; ".join(notes), 80)


def _increases(record: ComparisonRecord, kind: str) -> tuple[float, float]:
    """The predicted increase of the loss and the measured one, NaN if that is not known."""
    predicted, measured = record.predicted_loss, record.loss_increase.get(kind)
    return math.nan if predicted is None else predicted, math.nan if measured is None else measured


def plot_grid(records: Records, setting: str, path: Path) -> None:
    """Accuracy over the values of one setting, a panel for each sparsity, a line for each pruner (figures 10 to 13).

    The pruner as given is a point of its line.

    Args:
        records: What `lightning_cap.comparison.compare` returned.
        setting: Of the grids.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
    """
    changed, given = in_grid(records, setting), as_given(records)
    pruners = list(dict.fromkeys(record.pruner for record in changed))
    used = [record for record in given if record.pruner in pruners] + changed
    values = sorted({value_of(record, setting) for record in used}, key=number_first)
    positions, logarithmic = _positions(values)
    name, goals, looks = accuracy_name(records), goals_of(records), styles(list(by_label(given)))
    figure, every = panels(len(goals), 3.1, 2.7)
    for axes, goal in zip(every, goals, strict=True):
        for pruner in pruners:
            own = [record for record in used if (record.pruner, record.goal) == (pruner, goal)]
            points = []
            for value in values:
                here = [record for record in own if value_of(record, setting) == value]
                if (found := mean_and_deviation(metric_values(here, name))) is not None:
                    points.append((positions[value], found))
            _line(axes, [x for x, _ in points], [value for _, value in points], pruner, looks[pruner])
        if logarithmic:
            axes.set_xscale("log")
        axes.set_xticks(list(positions.values()), [_text(value) for value in values], fontsize=8)
        axes.minorticks_off()
        _at_least(axes, 0.02)
        axes.set_title(f"{percent(goal)} sparsity", fontsize=9)
        axes.set_xlabel(setting)
        axes.set_ylabel(name or "no metric")
        grid(axes)
    legend(figure, every[0])
    save(figure, path)


def _at_least(axes: Any, share: float) -> None:
    """Let the vertical axis span a share of its values, so that noise does not fill the panel."""
    low, high = axes.get_ylim()
    missing = share * max(abs(low), abs(high)) - (high - low)
    if missing > 0:
        axes.set_ylim(low - missing / 2, high + missing / 2)


def _positions(values: Sequence[Any]) -> tuple[dict[Any, float], bool]:
    """Where each value stands on the axis, and whether that is logarithmic; values that are no numbers are counted."""
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        return {value: float(i) for i, value in enumerate(values)}, False
    return {value: float(value) for value in values}, min(values) > 0 and max(values) >= 4 * min(values)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
