"""Pictures of masks: the sparsity of each layer, and how far the masks of two pruners agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_cap.comparison.records import intersection_over_union, load_masks
from lightning_cap.report.records import Records, as_given, by_label, first_seed, goals_of, percent
from lightning_cap.report.style import NUM_COLORS, grid, legend, panels, save, styles

_MOST_BARS = 120


def plot_layers(records: Records, path: Path) -> None:
    """The sparsity of each target as bars, a panel for each sparsity of the model (up to four), a colour for each pruner.

    Where the bars would be too many to tell apart, lines are drawn.

    Args:
        records: What `lightning_cap.comparison.compare` returned; of the first seed are drawn.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
    """
    found, goals = by_label(first_seed(as_given(records))), _spread(goals_of(records))
    looks = styles(list(found))
    names = list(next(iter(next(iter(found.values())).values()))[0].sparsities)
    width = min(22.0, max(5.0, 1.2 + len(names) * max(0.28, 0.09 * len(found))))
    figure, every = panels(len(goals), width, 1.75, columns=1)
    bar = 0.84 / len(found)
    as_lines = len(names) * len(found) > _MOST_BARS
    for axes, goal in zip(every, goals, strict=True):
        for i, (label, having) in enumerate(found.items()):
            if goal not in having:
                continue
            heights = [100 * having[goal][0].sparsities[name] for name in names]
            if as_lines:
                axes.plot(
                    range(len(names)), heights, label=label, **{**looks[label], "linewidth": 0.7, "markersize": 4}
                )
            else:
                x = [j - 0.42 + bar * (i + 0.5) for j in range(len(names))]
                hatch = "////" if i >= NUM_COLORS else None
                axes.bar(
                    x,
                    heights,
                    bar,
                    color=looks[label]["color"],
                    label=label,
                    edgecolor="white",
                    linewidth=0,
                    hatch=hatch,
                )
        axes.axhline(100 * goal, color="0.3", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_ylim(0, 102)
        axes.set_xlim(-0.7, len(names) - 0.3)
        axes.set_xticks(range(len(names)), [""] * len(names))
        axes.tick_params(axis="x", length=0)
        axes.set_ylabel("sparsity (%)", fontsize=8)
        axes.set_title(f"model: {percent(goal)}", fontsize=9, loc="left")
        grid(axes)
        axes.grid(visible=as_lines, axis="x")
    short = [name.removesuffix(".weight") for name in _without_common_start(names)]
    every[-1].set_xticks(range(len(names)), short, rotation=90, fontsize=min(8.0, 5 + 60 / len(names)))
    figure.set_figheight(figure.get_figheight() + 0.07 * max(map(len, short)))
    legend(figure, every[0])
    save(figure, path)


def _spread(values: Sequence[float], most: int = 4) -> list[float]:
    """At most so many of them, evenly from the first to the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _without_common_start(names: Sequence[str]) -> list[str]:
    parts = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return [".".join(p[common:]) for p in parts]


def mask_agreement(records: Records, folder: Path) -> dict[str, Any]:
    """Intersection over union of the kept weights, of every two pruners, at each sparsity (section 4.1).

    Args:
        records: What `lightning_cap.comparison.compare` returned; of the first seed are taken.
        folder: Which has their masks.

    Returns:
        ``{sparsity: {"pruners": names, "iou": matrix}}``, for sparsities that more than one pruner has.
    """
    out: dict[str, Any] = {}
    for goal in goals_of(records):
        chosen = [record for record in first_seed(as_given(records)) if record.goal == goal and record.masks]
        if len(chosen) > 1:
            masks = [load_masks(folder / record.masks) for record in chosen]
            matrix = [[intersection_over_union(one, other) for other in masks] for one in masks]
            out[f"{goal:g}"] = {"pruners": [record.label for record in chosen], "iou": matrix}
    return out


def plot_agreement(agreement: Mapping[str, Any], path: Path) -> None:
    """The matrices of `mask_agreement`, a panel for each sparsity (up to four).

    Args:
        agreement: What it returned.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
    """
    chosen = _spread([float(sparsity) for sparsity in agreement])
    agreement = {sparsity: entry for sparsity, entry in agreement.items() if float(sparsity) in chosen}
    most = max(len(entry["pruners"]) for entry in agreement.values())
    longest = max(len(name) for entry in agreement.values() for name in entry["pruners"])
    size = 1.0 + 0.46 * most + 0.05 * longest
    figure, every = panels(len(agreement), size, size, columns=2 if most > 6 else None)
    for axes, (sparsity, entry) in zip(every, agreement.items(), strict=True):
        names, matrix = entry["pruners"], entry["iou"]
        axes.imshow(matrix, vmin=0, vmax=1, cmap="cividis")
        for i, line in enumerate(matrix):
            for j, value in enumerate(line):
                color = "black" if value > 0.55 else "white"
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(f"mask IoU (%), {percent(float(sparsity))} sparsity", fontsize=9)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    save(figure, path)
