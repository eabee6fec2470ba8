"""Pictures of planes: the loss surface of two solutions, and the average Fisher block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import BoundaryNorm, LogNorm
from torch import Tensor

from lightning_cap.comparison.records import UNPRUNED, SurfaceRecord
from lightning_cap.report.records import percent
from lightning_cap.report.style import Looks, panels, plain, save, styles
from lightning_cap.utilities.arguments import require_instance

_DOUBLINGS = 10  # at most, of the height above the lowest loss, from line to line
_TOLD = 5e-4  # of a number: what its first four digits tell


def plot_surface(surface: SurfaceRecord, path: Path, looks: Looks | None = None, counted: str = "sparsity") -> None:
    """Contours of the loss in the plane of the weights before pruning and two pruned ones, the three marked (figure 4).

    The height above the lowest loss doubles from line to line, so that the bottom of the basin has lines too; between two lines
    the colour changes twice.

    Args:
        surface: The record in ``surface.json``.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
        looks: Colours and markers by the pruners' names. Default: those of a comparison of the two.
        counted: What the goal counts.
    """
    require_instance("surface", surface, SurfaceRecord, "read_record(path, SurfaceRecord)")
    looks = looks or styles(surface.pruners)
    axis, loss = np.array(surface.axis), np.array(surface.loss, dtype=float)
    figure, (axes,) = panels(1, 5.6, 4.6)
    finite = loss[np.isfinite(loss)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    span = high - low if high > low else 1.0  # a plain: contours need rising levels
    doublings = min(_DOUBLINGS, max(2, int(math.log2(span / max(_TOLD * abs(low), 1e-30)))))
    levels = low + span * np.concatenate([[0.0], 2.0 ** np.arange(-doublings, 0.25, 0.5)])
    extend = "neither" if finite.size == loss.size else "max"
    filled = axes.contourf(
        axis, axis, loss, levels=levels, norm=BoundaryNorm(levels, 256), cmap="viridis", extend=extend
    )
    ticks = levels[1::2]
    axes.contour(axis, axis, loss, levels=ticks[:-1], colors="white", linewidths=0.6, alpha=0.7)
    bar = figure.colorbar(filled, ax=axes, ticks=[low, *ticks], format="%.4g")
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    bar.set_label("validation loss; its height above the lowest doubles from line to line", fontsize=8)
    one, two = surface.pruners
    before: dict[str, Any] = {"color": "white", "marker": "*"}
    for name, x, y in ((UNPRUNED, 0, 0), (one, 1, 0), (two, 0, 1)):
        look = before if name == UNPRUNED else looks[name]
        place = {"markersize": 13 if name == UNPRUNED else 9, "linestyle": "none", "clip_on": False, "zorder": 5}
        edge = "black" if name == UNPRUNED else "white"
        axes.plot([x], [y], color=look["color"], marker=look["marker"], markeredgecolor=edge, **place)
        text = f"{plain(name)} ({surface.corners[name]:.3g})"
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "boxstyle": "round,pad=0.2"}
        shift, side = ((-7, 9), "right") if x else ((7, 9), "left")
        axes.annotate(
            text, (x, y), shift, textcoords="offset points", fontsize=8, color="black", zorder=6, ha=side, bbox=box
        )
    axes.set_xlabel(f"from {UNPRUNED} (0) to {plain(one)} (1)")
    axes.set_ylabel(f"from {UNPRUNED} (0) to {plain(two)} (1)")
    axes.set_title(f"{percent(surface.sparsity)} {counted}", fontsize=9)
    axes.set_aspect("equal")
    save(figure, path)


def plot_fisher_block(blocks: Mapping[str, Tensor], path: Path) -> None:
    """The average block of all targets: size of its entries, and the correlation of its weights (figure 16).

    Args:
        blocks: ``{target: (B, B)}`` with the average over all as ``"all"``.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
    """
    block = blocks["all"].double()
    size = block.abs().clamp_min(float(block.abs().max()) * 1e-6 or 1e-30)
    scale = block.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    correlation = block / scale / scale.unsqueeze(-1)
    away = correlation - torch.diag(correlation.diagonal())
    most = max(0.05, float(away.abs().flatten().quantile(0.995)) if away.numel() < 2**24 else 1.0)
    figure, (left, right) = panels(2, 4.4, 3.6)
    image = left.imshow(size.numpy(), norm=LogNorm(float(size.min()), float(size.max())), cmap="viridis")
    left.set_title("size of the entries", fontsize=9)
    figure.colorbar(image, ax=left, shrink=0.85)
    image = right.imshow(correlation.numpy(), vmin=-most, vmax=most, cmap="RdBu_r")
    right.set_title("correlation", fontsize=9)
    figure.colorbar(image, ax=right, shrink=0.85, extend="both")
    for axes in (left, right):
        axes.set_xlabel("weight in the block")
    figure.suptitle(f"average block of the empirical Fisher, B = {len(block)}", fontsize=10)
    save(figure, path)
