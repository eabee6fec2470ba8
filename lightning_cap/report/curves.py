"""Curves of a comparison: accuracy over sparsity, predicted against measured loss, accuracy over one setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_cap.report.rows import (
    Row,
    accuracy_name,
    by_label,
    dense_row,
    mean_and_deviation,
    metric_values,
    number_first,
    percent,
    plain_rows,
    targets_of,
)
from lightning_cap.report.style import grid, legend, panels, save, styles


def plot_accuracy(rows: Sequence[Row], path: Path) -> None:
    """Accuracy (or the first metric) over sparsity, a line for each pruner, with the deviation over seeds (figures 3, 7, 8).

    Args:
        rows: What `lightning_cap.comparison.compare` returned.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
    """
    name, dense, found = accuracy_name(rows), dense_row(rows), by_label(plain_rows(rows))
    looks = styles(list(found))
    figure, (axes,) = panels(1, 5.2, 3.8)
    if dense is not None and name is not None:
        axes.axhline(dense["metrics"][name], color="0.5", linewidth=1, linestyle=(0, (4, 3)), label="dense")
    for label, targets in found.items():
        points = [
            (100 * seeds[0]["sparsity"], value)
            for seeds in targets.values()
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


def plot_losses(rows: Sequence[Row], path: Path) -> bool:
    """The measured increase of the loss over the predicted one, for each pruner that predicts it; a point for each row.

    Measured on calibration samples where that is known, else on the validation data.

    Args:
        rows: What `lightning_cap.comparison.compare` returned.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.

    Returns:
        Whether there was anything to draw.
    """
    reading = [row for row in plain_rows(rows) if row["predicts_loss"]]
    kind = "calibration" if any(row["loss_increase"]["calibration"] is not None for row in reading) else "validation"
    known = [row for row in reading if row["loss_increase"][kind] is not None]
    shown = [row for row in known if all(0 < v < math.inf for v in (row["predicted_loss"], row["loss_increase"][kind]))]
    if not shown:
        return False
    looks = styles(list(by_label(plain_rows(rows))))
    figure, (axes,) = panels(1, 5.0, 4.2)
    for label, targets in by_label(shown).items():
        points = [(row["predicted_loss"], row["loss_increase"][kind]) for seeds in targets.values() for row in seeds]
        axes.plot(*zip(*points, strict=True), label=label, **{**looks[label], "linestyle": "none"}, alpha=0.85)
        for seed in set(_seeds(targets)):
            line = [point for point, own in zip(points, _seeds(targets), strict=True) if own == seed]
            axes.plot(*zip(*line, strict=True), color=looks[label]["color"], linewidth=0.8, alpha=0.5)
    values = [v for row in shown for v in (row["predicted_loss"], row["loss_increase"][kind])]
    ends = [(min(values), min(values)), (max(values), max(values))]
    axes.plot(*zip(*ends, strict=True), color="0.5", linewidth=1, linestyle=(0, (4, 3)), label="equal")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("predicted increase of the loss")
    axes.set_ylabel(f"measured increase ({kind} data)")
    if len(shown) < len(known):
        left = len(known) - len(shown)
        axes.set_title(f"{left} of {len(known)} have no increase to show", fontsize=8, color="0.35")
    grid(axes)
    legend(figure, axes)
    save(figure, path)
    return True


def _seeds(targets: Mapping[float, Sequence[Row]]) -> list[int]:
    return [row["seed"] for seeds in targets.values() for row in seeds]


def plot_grid(rows: Sequence[Row], setting: str, path: Path) -> None:
    """Accuracy over the values of one setting, a panel for each sparsity, a line for each pruner (figures 10 to 13).

    The pruner as given is a point of its line.

    Args:
        rows: What `lightning_cap.comparison.compare` returned.
        setting: Of the grids.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
    """
    in_grid = [row for row in rows if row["grid"] is not None and row["grid"]["setting"] == setting]
    pruners = list(dict.fromkeys(row["pruner"] for row in in_grid))
    used = [row for row in plain_rows(rows) if row["pruner"] in pruners] + in_grid
    values = sorted({row["parameters"][setting] for row in used}, key=number_first)
    positions, logarithmic = _positions(values)
    name, targets, looks = accuracy_name(rows), targets_of(rows), styles(list(by_label(plain_rows(rows))))
    figure, every = panels(len(targets), 3.1, 2.7)
    for axes, target in zip(every, targets, strict=True):
        for pruner in pruners:
            points = []
            for value in values:
                here = [
                    r for r in used if (r["pruner"], r["target"], r["parameters"][setting]) == (pruner, target, value)
                ]
                if here and (found := mean_and_deviation(metric_values(here, name))) is not None:
                    points.append((positions[value], found))
            _line(axes, [x for x, _ in points], [value for _, value in points], pruner, looks[pruner])
        if logarithmic:
            axes.set_xscale("log")
        axes.set_xticks(list(positions.values()), [_text(value) for value in values], fontsize=8)
        axes.minorticks_off()
        _at_least(axes, 0.02)
        axes.set_title(f"{percent(target)} sparsity", fontsize=9)
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
