"""How pictures look: colours that the colour-blind tell apart, markers, one place for saving."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import shown

Looks = Mapping[str, dict[str, Any]]  # of each label, for ``plot``

COLORS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#A8A116",
)  # Okabe and Ito's, nearly
NUM_COLORS = len(COLORS)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_STYLES = ("-", "--", ":")
_ENDINGS = (".png", ".svg", ".pdf")
_LONGEST = 60  # characters of a label
OUTLINE = [withStroke(linewidth=2, foreground="white")]  # of text upon lines
_NOTE = {"fontsize": 8, "color": "0.35"}


def styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line style of each label, for ``plot``."""
    return {
        label: {
            "color": COLORS[i % len(COLORS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _STYLES[i // len(COLORS) % len(_STYLES)],
            "markersize": 5,
            "linewidth": 1.6,
        }
        for i, label in enumerate(labels)
    }


def plain(text: str) -> str:
    """A user's string as a label: no formulas, nothing that matplotlib hides, and not too long."""
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    short = short.replace("$", r"\$")
    return f" {short}" if short.startswith("_") else short


def panels(count: int, width: float, height: float, columns: int | None = None) -> tuple[Figure, list[Any]]:
    """A figure with ``count`` axes of the given size in inches, line by line, four or three in a line."""
    columns = min(count, columns or (4 if count in (4, 7, 8) else 3))
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns + 0.3, height * lines + 0.2), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for empty in axes[count:]:
        empty.set_axis_off()
    return figure, axes[:count]


def grid(axes: Any) -> None:
    """Faint lines, no box around."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def goal_axis(axes: Any, goals: Sequence[float], counted: str) -> None:
    """A horizontal axis in per cent of what goals count, with a tick at each one."""
    close = len(goals) > 1 and min(b - a for a, b in itertools.pairwise(goals)) < 0.06 * (goals[-1] - goals[0])
    axes.set_xticks(
        [100 * goal for goal in goals], [f"{100 * goal:.4g}" for goal in goals], rotation=90 if close else 0
    )
    axes.set_xlabel(f"{counted} (%)")


def plain_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis as ``0.01``, with steps between powers of ten where there are few of those."""
    low, high = sorted(axis.get_view_interval())
    steps = (1.0,) if high > 1e3 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, axes: Any) -> None:
    """In the place of a panel that is left empty, else to the right of everything."""
    handles, labels = axes.get_legend_handles_labels()
    empty = [other for other in figure.axes if not other.axison]
    if labels and empty:
        empty[0].legend(handles, labels, loc="upper left", fontsize=8, frameon=False)
    elif labels:
        figure.set_figwidth(figure.get_figwidth() + 0.6 + 0.075 * max(map(len, labels)))
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)


def note(axes: Any, *lines: str) -> None:
    """Small grey lines above a panel, for what its reader has to know."""
    axes.set_title("\n".join(line for line in lines if line), **_NOTE)


def footnote(figure: Figure, *lines: str) -> None:
    """Small grey lines below all panels."""
    told = "\n".join(line for line in lines if line)
    if told:
        figure.supxlabel(told, **_NOTE)


def save(figure: Figure, path: Path) -> None:
    """Into a ``.png``, ``.svg`` or ``.pdf`` file.

    Raises:
        ConfigError: Another ending.
    """
    if not isinstance(path, Path) or path.suffix not in _ENDINGS:
        raise ConfigError(f"path={shown(path)}: give a pathlib.Path that ends in one of {', '.join(_ENDINGS)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.1)
