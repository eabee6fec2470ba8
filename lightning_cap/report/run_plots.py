"""Plots of a page, small enough for a telephone: of the epochs of a run, its layers, and what its events cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lightning_cap.report.csv_metrics import Curve
from lightning_cap.report.style import Looks, grid, plain, plain_ticks, styles
from lightning_cap.report.svg import FAINT, INK, MUTED, in_page_style, inline_svg

WIDTH = 4.2  # inches
HEIGHT = 2.7
_DASHED = (0, (4, 3))
_MOST_NAMED = 60  # layers, beyond which their names are left out
_MOST_TOLD = 2  # lines whose points tell their goals

#: Points of a line: share in [0, 1], value, and its deviation over seeds.
Points = Sequence[tuple[float, float, float]]


def figure(height: float = HEIGHT) -> tuple[Figure, Any]:
    """An empty plot of the page."""
    made = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = made.subplots()
    grid(axes)
    axes.set_axisbelow(True)
    return made, axes


def legend_below(made: Figure, axes: Any) -> None:
    """Under everything, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    columns = max(1, min(3, len(labels), int(62 / (max(map(len, labels)) + 7))))
    rows = -(-len(labels) // columns)
    made.set_figheight(made.get_figheight() + 0.19 * rows)
    made.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=1.8, columnspacing=1.2)


@in_page_style
def schedule_plot(name: str, sparsity: Curve, rates: Mapping[str, Curve], counted: str) -> Markup:
    """Sparsity and learning rate over epochs: the paper's Figure 2 on the left.

    Args:
        name: Of the plot.
        sparsity: After each event, and where the curve begins and ends.
        rates: Learning rates by name; empty if none was logged.
        counted: What goals count.
    """
    made, axes = figure()
    look = styles(["lr", "", "", "sparsity"])
    color = look["sparsity"]["color"]
    axes.plot(*zip(*((x, 100 * y) for x, y in sparsity), strict=True), drawstyle="steps-post", color=color, linewidth=2)
    axes.set_ylabel(f"{counted} (%)", color=color)
    axes.set_ylim(0, 100)
    axes.set_xlabel("epochs")
    if rates:
        other = axes.twinx()
        for place, curve in enumerate(rates.values()):
            other.plot(
                *zip(*curve, strict=True),
                color=look["lr"]["color"],
                linewidth=1.3,
                linestyle=("-", "--", ":")[place % 3],
            )
        other.set_ylim(bottom=0)
        other.set_ylabel("learning rate", color=look["lr"]["color"])
        other.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        other.spines["top"].set_visible(False)
        axes.set_zorder(other.get_zorder() + 1)
    told = " and learning rate" if rates else ""
    return inline_svg(made.savefig, name, f"{counted}{told} over epochs")


@in_page_style
def drop_plot(name: str, drops: Sequence[tuple[int, float, float]], metric: str) -> Markup:
    """How much of its accuracy each event took: the paper's Figure 2 on the right.

    Args:
        name: Of the plot.
        drops: Epoch of each event, its goal, and the drop relative to the value before.
        metric: That it is of.
    """
    made, axes = figure()
    few = len(drops) <= 12
    x = range(len(drops)) if few else [epoch for epoch, _, _ in drops]
    heights = [100 * drop for _, _, drop in drops]
    bars = axes.bar(x, heights, 0.55 if few else 0.8, color=styles(["", "drop"])["drop"]["color"])
    axes.axhline(0, color=MUTED, linewidth=0.8)
    if few:
        axes.set_xticks(list(x), [f"{100 * goal:.4g} %\nepoch {epoch}" for epoch, goal, _ in drops])
        axes.bar_label(bars, [f"{height:.2f}".replace("-", "−") for height in heights], padding=2, fontsize=8)
        axes.margins(y=0.15)
        axes.tick_params(axis="x", length=0, labelsize=8.5 if len(drops) <= 6 else 6.5)
    else:
        axes.set_xlabel("epoch of the event")
    axes.set_ylabel(f"relative drop of {plain(metric)} (%)")
    axes.grid(visible=False, axis="x")
    return inline_svg(made.savefig, name, f"Relative drop of {metric} at each pruning event")


@in_page_style
def metric_plot(
    name: str, curve: Curve, metric: str, events: Sequence[int], dense: float | None, factor: float
) -> Markup:
    """A metric after each epoch, with the events as lines and the dense model's value.

    Args:
        name: Of the plot.
        curve: The metric.
        metric: Its name.
        events: Their epochs.
        dense: Its value before the first event, if that is known.
        factor: That values are multiplied by: 100 for per cent.
    """
    made, axes = figure()
    for epoch in events:
        axes.axvline(epoch, color=MUTED, linewidth=0.7, linestyle=":")
    if dense is not None:
        axes.axhline(factor * dense, color=MUTED, linewidth=1, linestyle=_DASHED, label="before the first event")
    look = styles(["line"])["line"] | ({"marker": "", "linewidth": 1.3} if len(curve) > 40 else {"markersize": 3.5})
    axes.plot(*zip(*((x, factor * y) for x, y in curve), strict=True), **look, label=plain(metric))
    axes.set_xlabel("epochs (dotted: pruning events)" if events else "epochs")
    axes.set_ylabel(f"{plain(metric)}{' (%)' if factor == 100 else ''}")
    legend_below(made, axes)
    return inline_svg(made.savefig, name, f"{metric} over epochs")


@in_page_style
def accuracy_plot(
    name: str, lines: Mapping[str, Points], dense: Mapping[str, float], metric: str, counted: str, factor: float,
    limits: tuple[float, float] | None = None,
) -> Markup:  # fmt: skip
    """A metric over sparsity, a line for each run or pruner, with the dense models' values dashed.

    Args:
        name: Of the plot.
        lines: Points by label; bands show deviations.
        dense: Value by label, of the models before pruning: those of ``lines`` get the same colour.
        metric: Its name.
        counted: What goals count.
        factor: That values are multiplied by: 100 for per cent.
        limits: Vertical range, None for all.
    """
    made, axes = figure(3.1)
    looks = styles(list(lines))
    for label, value in dense.items():
        color = looks[label]["color"] if label in looks else MUTED
        told = f"{plain(label)}, dense" if label in looks else plain(label)
        axes.axhline(factor * value, color=color, linewidth=1, linestyle=_DASHED, label=told)
    for label, points in lines.items():
        x, mean = [100 * point[0] for point in points], [factor * point[1] for point in points]
        axes.plot(x, mean, label=plain(label), **{**looks[label], "markersize": 4.5, "linewidth": 1.4})
        if any(point[2] for point in points):
            low, high = ([factor * (p[1] + sign * p[2]) for p in points] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=looks[label]["color"], alpha=0.15, linewidth=0)
    if limits is not None:
        axes.set_ylim(factor * limits[0], factor * limits[1])
    axes.set_xlabel(f"{counted} (%)")
    axes.set_ylabel(f"{plain(metric)}{' (%)' if factor == 100 else ''}")
    legend_below(made, axes)
    return inline_svg(made.savefig, name, f"{metric} over {counted}")


@in_page_style
def loss_plot(
    name: str, points: Mapping[str, Sequence[tuple[float, float, float]]], of: str, looks: Looks | None = None
) -> Markup:
    """Measured over predicted increase of the loss, where both are above zero.

    Args:
        name: Of the plot.
        points: Predicted, measured and goal of each, by label.
        of: What the loss was measured on.
        looks: Of the labels. Default: their own.
    """
    made, axes = figure(3.1)
    looks = looks or styles(list(points))
    for label, own in points.items():
        axes.plot([p[0] for p in own], [p[1] for p in own], label=plain(label), **{**looks[label], "linewidth": 1.0})
        for x, y, goal in own if len(points) <= _MOST_TOLD else ():
            axes.annotate(
                f"{100 * goal:.4g}",
                (x, y),
                (4, -9),
                textcoords="offset points",
                fontsize=7,
                color=looks[label]["color"],
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.12)
    lows, highs = zip(axes.get_xlim(), axes.get_ylim(), strict=True)
    ends = min(lows), max(highs)  # of both axes, so that the line of equal values is in sight
    axes.plot(ends, ends, color=MUTED, linewidth=1, linestyle=_DASHED, label="equal", zorder=1)
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    plain_ticks(axes.xaxis)
    plain_ticks(axes.yaxis)
    axes.set_xlabel("predicted increase of the loss")
    axes.set_ylabel(f"measured increase ({plain(of)})")
    legend_below(made, axes)
    return inline_svg(made.savefig, name, "Measured over predicted increase of the loss")


@in_page_style
def layers_plot(
    name: str, layers: Sequence[str], values: Mapping[str, Sequence[float | None]], axis: str,
    behind: Sequence[float] = (), looks: Looks | None = None,
) -> Markup:  # fmt: skip
    """A value of each layer, a marker for each goal.

    Args:
        name: Of the plot.
        layers: Their names, from the first to the last.
        values: Of each layer, by what they are of; None for none.
        axis: What the values are.
        behind: Bars behind the markers, of each layer, if there are any.
        looks: Of what the values are of. Default: their own.
    """
    named = len(layers) <= _MOST_NAMED
    made, axes = figure(0.8 + 0.16 * len(layers) if named else 3.0)
    looks = looks or styles(list(values))
    places = list(range(len(layers)))
    if len(behind):
        (axes.barh if named else axes.bar)(places, behind, 0.72, color=FAINT, label="dense")
    for label, own in values.items():
        known = [(place, value) for place, value in zip(places, own, strict=True) if value is not None]
        x, y = [value for _, value in known], [place for place, _ in known]
        look = {**looks[label], "linestyle": "none", "markersize": 4 if named else 3}
        axes.plot(*((x, y) if named else (y, x)), label=plain(label), **look)
    if named:
        axes.set_yticks(places, [plain(layer) for layer in layers], fontsize=8)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.set_xlabel(axis)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 103 if axis.endswith("(%)") else None)
    else:
        axes.set_xlabel("layer, from the first to the last")
        axes.set_ylabel(axis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
    legend_below(made, axes)
    return inline_svg(made.savefig, name, f"{axis} of each layer")


@in_page_style
def bars_plot(
    name: str,
    places: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    axis: str,
    stacked: bool,
    limit: float | None = None,
) -> Markup:
    """Horizontal bars of several kinds at each place, above each other or one after the other.

    Args:
        name: Of the plot.
        places: Labels, from top to bottom.
        parts: Lengths at each place, by kind.
        axis: What the lengths are.
        stacked: Whether the kinds add up.
        limit: A line across, if there is a limit.
    """
    made, axes = figure(0.7 + (0.26 if stacked else 0.2 * len(parts) + 0.08) * len(places))
    looks = styles(list(parts))
    start, thick = [0.0] * len(places), 0.66 if stacked else 0.8 / len(parts)
    for row, (kind, lengths) in enumerate(parts.items()):
        y = [place + (0 if stacked else thick * (row - (len(parts) - 1) / 2)) for place in range(len(places))]
        axes.barh(y, lengths, thick, left=start, color=looks[kind]["color"], label=plain(kind))
        if stacked:
            start = [a + b for a, b in zip(start, lengths, strict=True)]
    if limit is not None:
        axes.axvline(limit, color=INK, linewidth=1, linestyle=_DASHED, label="limit")
    axes.set_yticks(range(len(places)), [plain(place) for place in places])
    axes.set_ylim(len(places) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(axis)
    legend_below(made, axes)
    return inline_svg(made.savefig, name, axis)
