"""The pictures that loggers are given: sparsity by layer, and a histogram of saliency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_cap.trainer.saliency import ScoreHistogram

_COLOR = "#0072B2"
_NAMED = 120  # layers of which each has its name beside it
_TALLEST = 24.0  # inches


def sparsity_figure(sparsities: Mapping[str, float], title: str) -> Any:
    """A bar for each layer, from the first on top to the last.

    Args:
        sparsities: ``{target: share of zeros}``.
        title: Above it.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    names = list(sparsities)
    figure = _figure(7.0, min(_TALLEST, 1.0 + 0.2 * len(names)))
    axes = figure.subplots()
    height = 0.8 if len(names) <= _NAMED else 1.0
    axes.barh(range(len(names)), [100 * sparsities[name] for name in names], color=_COLOR, height=height)
    shown = range(0, len(names), -(-len(names) // _NAMED))
    axes.set_yticks(list(shown), [_escaped(names[i]) for i in shown], fontsize=7)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("zeros (%)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def saliency_figure(saliency: ScoreHistogram, title: str) -> Any:
    """The histogram as a picture, for loggers that take no histograms.

    Args:
        saliency: Of the event.
        title: Above it.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    figure = _figure(6.0, 3.5)
    axes = figure.subplots()
    axes.stairs(saliency.counts, saliency.edges, fill=True, color=_COLOR)
    axes.set_xlabel("log10 of the saliency")
    axes.set_ylabel("weights or units")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def pixels(figure: Any) -> Any:
    """The picture ``(height, width, 3)`` uint8, as a numpy array."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not before a logger wants one: it takes a while to import

    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _escaped(name: str) -> str:
    """A name is no formula, whatever it holds."""
    return name.replace("$", r"\$")
