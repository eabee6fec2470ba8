"""Curves of a comparison: accuracy over sparsity, predicted against measured loss, accuracy over one setting."""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_cap.comparison.records import ComparisonRecord
from lightning_cap.report.records import (
    Records,
    accuracy_name,
    as_given,
    by_label,
    counted,
    goals_of,
    grid_settings,
    in_grid,
    mean_and_deviation,
    metric_values,
    number_first,
    percent,
    require_records,
    unpruned_record,
    value_of,
)
from lightning_cap.report.style import (
    OUTLINE,
    footnote,
    goal_axis,
    grid,
    legend,
    note,
    panels,
    plain,
    plain_ticks,
    save,
    styles,
)
from lightning_cap.utilities.arguments import require_choice

_FAR = 12.0  # times the median distance from the unpruned model: what is farther is left out of a panel
_GAIN = 4.0  # times the room that the others have then
_MOST = 0.6  # of all values
_CLOSE = 0.5  # of all values: where those near the unpruned model's take less, they have a panel of their own


def plot_accuracy(records: Records, path: Path) -> None:
    """Accuracy (or the first metric) over sparsity, a line for each pruner, with the deviation over seeds (figures 3, 7, 8).

    Where some pruners fall so far that the others lie on each other, a second panel shows the values near the unpruned model's.

    Args:
        records: What `lightning_cap.comparison.compare` returned.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
    """
    require_records(records)
    name, unpruned, found = accuracy_name(records), unpruned_record(records), by_label(as_given(records))
    start = _start(records, name)
    looks = styles(list(found))
    lines = {
        label: [
            (100 * statistics.fmean(record.reached for record in seeds), value)
            for seeds in goals.values()
            if (value := mean_and_deviation(metric_values(seeds, name))) is not None and math.isfinite(value[0])
        ]
        for label, goals in found.items()
    }
    near = None if start is None else near_range(start, [[value for _, value in points] for points in lines.values()])
    figure, every = panels(1 if near is None else 2, 4.8, 3.8)
    for axes in every:
        if unpruned is not None and start is not None:
            axes.axhline(start, color="0.5", linewidth=1, linestyle=(0, (4, 3)), label=unpruned.label)
        for label, points in lines.items():
            _line(axes, [x for x, _ in points], [value for _, value in points], label, looks[label])
        goal_axis(axes, goals_of(records), counted(records))
        axes.set_ylabel(plain(name or "no metric"))
        grid(axes)
    if near is not None:
        every[1].set_ylim(*near)
        note(every[0], "all values")
        note(every[1], "the same, near the model before pruning")
    footnote(figure, deviation_note(records))
    legend(figure, every[0])
    save(figure, path)


def _start(records: Records, name: str | None) -> float | None:
    """The metric of the model before pruning."""
    unpruned = unpruned_record(records)
    return None if unpruned is None or name is None else unpruned.metrics.get(name)


def near_range(start: float, lines: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float] | None:
    """The range of what comes near to ``start``; None if all values hardly take more.

    Near are the nearest at each sparsity, and most of all.
    """
    values = [mean for line in lines for mean, _ in line]
    if len(lines) < 2 or not values:
        return None
    columns = [[abs(point[0] - start) for point in column] for column in zip(*lines, strict=False)]
    distances = sorted(abs(value - start) for value in values)
    most = max([distances[int(_MOST * (len(values) - 1))], *(min(column) for column in columns)])
    near = [start, *(value for value in values if abs(value - start) <= most)]
    low, high = min(near), max(near)
    if not 0 < high - low < _CLOSE * (max(*values, start) - min(*values, start)):
        return None
    return low - 0.08 * (high - low), high + 0.08 * (high - low)


def deviation_note(records: Records) -> str:
    """What lines and bands show, if there is more than one seed."""
    seeds = len({record.seed for record in as_given(records)})
    return f"lines: mean over {seeds} seeds; bands: standard deviation" if seeds > 1 else ""


def _line(axes: Any, x: Sequence[Any], values: Sequence[tuple[float, float]], label: str, look: dict[str, Any]) -> None:
    """A line through means, with a band of the deviation."""
    mean = [value[0] for value in values]
    axes.plot(x, mean, label=plain(label), **look)
    if any(value[1] for value in values):
        low, high = [m - s for m, s in values], [m + s for m, s in values]
        axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)


def plot_losses(records: Records, path: Path) -> bool:
    """The measured increase of the loss over the predicted one, for each pruner that predicts it; a point for each record.

    Measured on calibration samples where that is known, else on the validation data. A line joins the geometric means over the
    seeds, each with its sparsity.

    Args:
        records: What `lightning_cap.comparison.compare` returned.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.

    Returns:
        Whether there was anything to draw.
    """
    require_records(records)
    predicting = [record for record in as_given(records) if record.predicted_loss is not None]
    kind = "calibration" if any(r.loss_increase.get("calibration") is not None for r in predicting) else "validation"
    known = [record for record in predicting if record.loss_increase.get(kind) is not None]
    shown = [record for record in known if all(0 < value < math.inf for value in _increases(record, kind))]
    if not shown:
        return False
    looks = styles(list(by_label(as_given(records))))
    figure, (axes,) = panels(1, 6.0, 4.8)
    for label, goals in by_label(shown).items():
        _losses_of(
            axes, {goal: [_increases(r, kind) for r in seeds] for goal, seeds in goals.items()}, label, looks[label]
        )
    values = [value for record in shown for value in _increases(record, kind)]
    axes.set_xscale("log")
    axes.set_yscale("log")
    limits = axes.get_xlim(), axes.get_ylim()
    ends = min(values) / 1e3, max(values) * 1e3
    axes.plot(ends, ends, color="0.5", linewidth=1, linestyle=(0, (4, 3)), label="equal", zorder=1)
    axes.set_xlim(limits[0])
    axes.set_ylim(limits[1])
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.set_xlabel("predicted increase of the loss")
    axes.set_ylabel(f"measured increase of the loss ({kind} data)")
    several = len({record.seed for record in shown}) > 1
    how = f"numbers: {counted(records)} in %" + (
        "; small points: seeds, lines: their geometric means" if several else ""
    )
    footnote(figure, how, _left_out(records, known, shown))
    grid(axes)
    legend(figure, axes)
    save(figure, path)
    return True


def _losses_of(
    axes: Any, points: Mapping[float, Sequence[tuple[float, float]]], label: str, look: dict[str, Any]
) -> None:
    """A line through the means of one pruner, each with its sparsity, and a small point for each record."""
    means = [
        tuple(statistics.geometric_mean(values) for values in zip(*seeds, strict=True)) for seeds in points.values()
    ]
    axes.plot(*zip(*means, strict=True), label=plain(label), **look)
    for (x, y), (goal, seeds) in zip(means, points.items(), strict=True):
        place = {"xytext": (4, -9), "textcoords": "offset points", "zorder": 4, "path_effects": OUTLINE}
        axes.annotate(f"{100 * goal:.4g}", (x, y), fontsize=7, color=look["color"], **place)
        if len(seeds) > 1:
            small = {"color": look["color"], "marker": look["marker"], "markersize": 2.5, "linestyle": "none"}
            axes.plot(*zip(*seeds, strict=True), alpha=0.6, **small)


def _left_out(records: Records, known: Records, shown: Records) -> str:
    """What the figure of losses does not show, in words; empty if there is nothing."""
    silent = list(by_label([record for record in as_given(records) if record.predicted_loss is None]))
    notes = [f"no loss predicted by: {', '.join(map(plain, silent))}"] if silent else []
    if len(shown) < len(known):
        notes.append(f"{len(known) - len(shown)} of {len(known)} have no increase to show")
    return textwrap.fill("; ".join(notes), 90)


def _increases(record: ComparisonRecord, kind: str) -> tuple[float, float]:
    """The predicted increase of the loss and the measured one, NaN if that is not known."""
    predicted, measured = record.predicted_loss, record.loss_increase.get(kind)
    return math.nan if predicted is None else predicted, math.nan if measured is None else measured


def plot_grid(records: Records, setting: str, path: Path) -> None:
    """Accuracy over the values of one setting, a panel for each sparsity, a line for each pruner (figures 10 to 13).

    The pruner as given is a point of its line, with a ring. Each panel has its own range, which leaves out what is far from the
    others; that is told above it.

    Args:
        records: What `lightning_cap.comparison.compare` returned.
        setting: Of the grids.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
    """
    require_records(records)
    require_choice("setting", setting, grid_settings(records) or ["no grid"])
    changed, given = in_grid(records, setting), as_given(records)
    pruners = list(dict.fromkeys(record.pruner for record in changed))
    used = [record for record in given if record.pruner in pruners] + changed
    values = sorted({value_of(record, setting) for record in used}, key=number_first)
    positions, logarithmic = _positions(values)
    name, goals, looks = accuracy_name(records), goals_of(records), styles(list(by_label(given)))
    start = _start(records, name)
    figure, every = panels(len(goals), 3.3, 2.8)
    for axes, goal in zip(every, goals, strict=True):
        here = [record for record in used if record.goal == goal]
        measured = [v for v in metric_values(here, name) if v is not None and math.isfinite(v)]
        outside = _limit(axes, measured, max(measured, default=0.0) if start is None else start)
        for pruner in pruners:
            own = [record for record in here if record.pruner == pruner]
            _values_of(axes, own, {v: positions[v] for v in values}, setting, name, pruner, looks[pruner])
        if logarithmic:
            axes.set_xscale("log")
        axes.set_xticks(list(positions.values()), [_text(value) for value in values], fontsize=8)
        axes.minorticks_off()
        axes.set_title(f"{percent(goal)} {counted(records)}{outside}", fontsize=9)
        axes.set_xlabel(setting)
        axes.set_ylabel(plain(name or "no metric"))
        grid(axes)
    footnote(figure, "ring: the pruner as given; each panel has a vertical axis of its own", deviation_note(records))
    legend(figure, every[0])
    save(figure, path)


def _values_of(
    axes: Any,
    own: Records,
    positions: Mapping[Any, float],
    setting: str,
    name: str | None,
    pruner: str,
    look: dict[str, Any],
) -> None:
    """The line of one pruner in one panel of a grid."""
    points = []
    for value, position in positions.items():
        here = [record for record in own if value_of(record, setting) == value]
        found = mean_and_deviation(metric_values(here, name))
        if found is not None:
            points.append((position, found))
            if any(record.grid is None for record in here):
                ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "linestyle": "none"}
                axes.plot([position], [found[0]], color=look["color"], markeredgewidth=0.9, **ring)
    _line(axes, [x for x, _ in points], [value for _, value in points], pruner, look)


def _limit(axes: Any, values: Sequence[float], start: float) -> str:
    """Set the vertical range to where most values are; says how many are outside.

    Those are outside whose distance from ``start`` is a multiple of the median's, if the panel gains by it.
    """
    if not values:
        return ""
    usual = statistics.median(abs(value - start) for value in values)
    kept = [value for value in values if abs(value - start) <= _FAR * max(usual, 0.005 * abs(start))]
    if max(values) - min(values) < _GAIN * (max(kept) - min(kept)):
        kept = list(values)
    low, high = min(kept), max(kept)
    least = 0.01 * max(abs(low), abs(high))  # so that noise does not fill the panel
    margin = max(0.06 * (high - low), (least - (high - low)) / 2)
    if margin > 0:
        axes.set_ylim(low - margin, high + margin)
    outside = len(values) - len(kept)
    return f" ({outside} of {len(values)} results are outside)" if outside else ""


def _positions(values: Sequence[Any]) -> tuple[dict[Any, float], bool]:
    """Where each value stands on the axis, and whether that is logarithmic; values that are no numbers are counted."""
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        return {value: float(i) for i, value in enumerate(values)}, False
    return {value: float(value) for value in values}, min(values) > 0 and max(values) >= 4 * min(values)


def _text(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return plain(re.sub(r"e([+-])0+(?=\d)", r"e\1", text))
