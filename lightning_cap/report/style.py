"""How pictures look: colours that the colour-blind tell apart, markers, one place for saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#A8A116",
)  # Okabe and Ito's, nearly
NUM_COLORS = len(_COLORS)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_STYLES = ("-", "--", ":")


def styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each label, for ``plot``."""
    return {
        label: {
            "color": _COLORS[i % len(_COLORS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _STYLES[i // len(_COLORS) % len(_STYLES)],
            "markersize": 5,
            "linewidth": 1.6,
        }
        for i, label in enumerate(labels)
    }


def panels(count: int, width: float, height: float, columns: int | None = None) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` axes of the given size in inches, line by line, four or three in a line."""
    columns = min(count, columns or (4 if count in (4, 7, 8) else 3))
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns + 0.3, height * lines + 0.2), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for empty in axes[count:]:
        empty.remove()
    return figure, axes[:count]


def grid(axes: Any) -> None:
    """Faint lines, no box around."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, axes: Any) -> None:
    """Inside where few lines leave room, else to the right of everything."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= 4 and len(figure.axes) == 1:
        axes.legend(fontsize=8, frameon=False)
    elif labels:
        figure.set_figwidth(figure.get_figwidth() + 0.6 + 0.075 * max(map(len, labels)))
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Into a ``.png``, ``.svg`` or ``.pdf`` file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.1)
