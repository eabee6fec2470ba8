"""Pictures of masks: the sparsity of each layer, and how far the masks of two pruners agree."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import Normalize

from lightning_cap.comparison.records import intersection_over_union, load_masks
from lightning_cap.report.layer_names import short_names, spread
from lightning_cap.report.records import (
    Records,
    as_given,
    by_label,
    counted,
    first_seed,
    goals_of,
    percent,
    require_records,
)
from lightning_cap.report.style import NUM_COLORS, Looks, footnote, grid, legend, panels, plain, save, styles

_MOST_BARS = 120
_MOST_PANELS = 24


def plot_layers(records: Records, path: Path) -> None:
    """The sparsity of each target as bars, a panel for each sparsity of the model, a colour for each pruner.

    Where the bars would be too many to tell apart, lines are drawn.

    Args:
        records: What `lightning_cap.comparison.compare` returned; of the first seed are drawn.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
    """
    require_records(records)
    found, every_goal = by_label(first_seed(as_given(records))), goals_of(records)
    goals, zeros = spread(every_goal, _MOST_PANELS), counted(records) == "sparsity"
    looks = styles(list(found))
    names = list(next(iter(next(iter(found.values())).values()))[0].sparsities)
    width = min(22.0, max(5.0, 1.2 + len(names) * max(0.28, 0.09 * len(found))))
    figure, every = panels(len(goals), width, 1.75, columns=1)
    for axes, goal in zip(every, goals, strict=True):
        heights = {
            label: [100 * having[goal][0].sparsities[name] for name in names]
            for label, having in found.items()
            if goal in having
        }
        _layers_of(axes, heights, looks, as_lines=len(names) * len(found) > _MOST_BARS)
        if zeros:
            axes.axhline(100 * goal, color="0.3", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 102)
        axes.set_xlim(-0.7, len(names) - 0.3)
        axes.set_xticks(range(len(names)), [""] * len(names))
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("sparsity (%)", fontsize=8)
        axes.set_title(f"model: {percent(goal)}" + ("" if zeros else f" {counted(records)}"), fontsize=9, loc="left")
    short = [plain(name) for name in short_names(names)]
    every[-1].set_xticks(range(len(names)), short, rotation=90, fontsize=min(8.0, 5 + 60 / len(names)))
    figure.set_figheight(figure.get_figheight() + 0.07 * max(map(len, short)))
    footnote(figure, _shown_of(goals, every_goal), seed_note(records))
    legend(figure, every[0])
    save(figure, path)


def _layers_of(axes: Any, heights: Mapping[str, Sequence[float]], looks: Looks, as_lines: bool) -> None:
    """One panel of bars or lines; a pruner has its place also where it has no bars."""
    labels, bar = list(looks), 0.84 / len(looks)
    for label, values in heights.items():
        i, look = labels.index(label), looks[label]
        if as_lines:
            axes.plot(range(len(values)), values, label=plain(label), **{**look, "linewidth": 0.7, "markersize": 4})
            continue
        x = [j - 0.42 + bar * (i + 0.5) for j in range(len(values))]
        hatch = "////" if i >= NUM_COLORS else None
        axes.bar(x, values, bar, color=look["color"], label=plain(label), edgecolor="white", linewidth=0, hatch=hatch)
    grid(axes)
    axes.grid(visible=as_lines, axis="x")


def _shown_of(shown: Sequence[float], every: Sequence[float]) -> str:
    left = [percent(goal) for goal in every if goal not in shown]
    if not left:
        return ""
    return textwrap.fill(f"{len(shown)} of {len(every)} sparsities, for want of room; not shown: {', '.join(left)}", 90)


def seed_note(records: Records) -> str:
    """Which seed a figure is of, if there is more than one."""
    seeds = list(dict.fromkeys(record.seed for record in as_given(records)))
    return f"of seed {seeds[0]}, the first of {len(seeds)}" if len(seeds) > 1 else ""


def mask_agreement(records: Records, folder: Path) -> dict[str, Any]:
    """Intersection over union of the kept weights, of every two pruners, at each sparsity (section 4.1).

    Args:
        records: What `lightning_cap.comparison.compare` returned; of the first seed are taken.
        folder: Which has their masks.

    Returns:
        ``{sparsity: {"pruners": names, "iou": matrix}}``, for sparsities that more than one pruner has.
    """
    require_records(records)
    out: dict[str, Any] = {}
    for goal in goals_of(records):
        chosen = [record for record in first_seed(as_given(records)) if record.goal == goal and record.masks]
        if len(chosen) > 1:
            masks = [load_masks(folder / record.masks) for record in chosen]
            matrix = [[intersection_over_union(one, other) for other in masks] for one in masks]
            out[f"{goal:g}"] = {"pruners": [record.label for record in chosen], "iou": matrix}
    return out


def plot_agreement(agreement: Mapping[str, Any], path: Path, told: str = "", counted: str = "sparsity") -> None:
    """The matrices of `mask_agreement`, a panel for each sparsity.

    Args:
        agreement: What it returned.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
        told: What to say below.
        counted: What the goals count. Only of zeros it is known how far masks agree by chance.
    """
    goals = [float(sparsity) for sparsity in agreement]
    chosen = spread(goals, _MOST_PANELS)
    most = max(len(entry["pruners"]) for entry in agreement.values())
    longest = max(len(plain(name)) for entry in agreement.values() for name in entry["pruners"])
    size = 1.0 + 0.46 * most + 0.05 * longest
    figure, every = panels(len(chosen), size, size, columns=2 if most > 6 else None)
    apart = [
        value for e in agreement.values() for i, line in enumerate(e["iou"]) for j, value in enumerate(line) if i != j
    ]
    colors = Normalize(100 * min(apart), 100 * max(max(apart), min(apart) + 0.05))
    image: Any = None
    for axes, goal in zip(every, chosen, strict=True):
        entry = next(entry for sparsity, entry in agreement.items() if float(sparsity) == goal)
        image = _matrix(axes, 100 * np.array(entry["iou"]), list(map(plain, entry["pruners"])), colors)
        chance = f" (by chance: {100 * (1 - goal) / (1 + goal):.0f})" if counted == "sparsity" else ""
        axes.set_title(f"{percent(goal)} {counted}{chance}", fontsize=9)
    bar = figure.colorbar(image, ax=every, shrink=0.6, aspect=30)
    bar.set_label("intersection over union of the kept weights (%)", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    footnote(figure, _shown_of(chosen, goals), told)
    save(figure, path)


def _matrix(axes: Any, values: Any, names: Sequence[str], colors: Normalize) -> Any:
    """One panel; the diagonal, which is 100, is left grey."""
    axes.set_facecolor("0.9")
    image = axes.imshow(np.where(np.eye(len(values), dtype=bool), np.nan, values), norm=colors, cmap="cividis")
    for (i, j), value in np.ndenumerate(values):
        color = "0.5" if i == j else "black" if colors(value) > 0.5 else "white"
        axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image
