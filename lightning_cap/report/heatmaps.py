"""Pictures of planes: the loss surface of two solutions, and the average Fisher block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import BoundaryNorm, LogNorm
from torch import Tensor

from lightning_cap.comparison.records import UNPRUNED, SurfaceRecord
from lightning_cap.report.records import percent
from lightning_cap.report.style import panels, save


def plot_surface(surface: SurfaceRecord, path: Path) -> None:
    """Contours of the loss in the plane of the weights before pruning and two pruned ones, the three marked (figure 4).

    Args:
        surface: The record in ``surface.json``.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
    """
    axis, loss = np.array(surface.axis), np.array(surface.loss, dtype=float)
    one, two = surface.pruners
    figure, (axes,) = panels(1, 5.4, 4.4)
    finite = loss[np.isfinite(loss)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    span = high - low if high > low else 1.0  # a plain: contours need rising levels
    levels = np.concatenate([[low], low + span * np.geomspace(1 / 1024, 1, 21)])  # fine at the bottom of the basin
    norm = BoundaryNorm(levels, 256)
    filled = axes.contourf(axis, axis, loss, levels=levels, norm=norm, cmap="viridis", extend="both")
    lines = axes.contour(axis, axis, loss, levels=levels[1::4], colors="white", linewidths=0.7, alpha=0.8)
    axes.clabel(lines, fmt="%.4g", fontsize=7)
    bar = figure.colorbar(filled, ax=axes, ticks=levels[1::4], format="%.4g")
    bar.set_label("validation loss")
    for name, x, y, marker in ((UNPRUNED, 0, 0, "*"), (one, 1, 0, "o"), (two, 0, 1, "s")):
        place = {"color": "#D55E00", "marker": marker, "markersize": 9, "linestyle": "none", "clip_on": False}
        axes.plot([x], [y], markeredgecolor="white", zorder=5, **place)
        text = f"{name} ({surface.corners[name]:.3g})"
        box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "boxstyle": "round,pad=0.2"}
        shift, side = ((-7, 8), "right") if x else ((7, 8), "left")
        axes.annotate(text, (x, y), shift, textcoords="offset points", fontsize=8, zorder=6, ha=side, bbox=box)
    axes.set_xlabel(f"unpruned to {one}")
    axes.set_ylabel(f"unpruned to {two}")
    axes.set_title(f"{percent(surface.sparsity)} sparsity", fontsize=9)
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
