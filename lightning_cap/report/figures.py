"""Draws all pictures of a comparison into its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from lightning_cap.report.curves import plot_accuracy, plot_grid, plot_losses
from lightning_cap.report.heatmaps import plot_fisher_block, plot_surface
from lightning_cap.report.mask_plots import mask_agreement, plot_agreement, plot_layers
from lightning_cap.report.rows import Row
from lightning_cap.utilities.files import save_json


def draw_all(rows: Sequence[Row], folder: Path) -> list[str]:
    """Whatever there is something to draw of.

    Args:
        rows: What `lightning_cap.comparison.compare` returned.
        folder: Which has their masks, ``surface.json`` and ``fisher_block.safetensors``; the pictures go there.

    Returns:
        The names of the files.
    """
    drawn = ["accuracy.png", "layers.png"]
    plot_accuracy(rows, folder / "accuracy.png")
    plot_layers(rows, folder / "layers.png")
    if plot_losses(rows, folder / "losses.png"):
        drawn.append("losses.png")
    agreement = mask_agreement(rows, folder)
    if agreement:
        save_json(folder / "iou.json", agreement)
        plot_agreement(agreement, folder / "iou.png")
        drawn += ["iou.json", "iou.png"]
    for setting in dict.fromkeys(row["grid"]["setting"] for row in rows if row["grid"] is not None):
        plot_grid(rows, setting, folder / f"grid-{setting}.png")
        drawn.append(f"grid-{setting}.png")
    return drawn + _draw_planes({row["fingerprint"] for row in rows}, folder)


def _draw_planes(known: set[str], folder: Path) -> list[str]:
    """The loss surface and the Fisher block, if they are there and of these rows."""
    drawn = []
    surface, block = folder / "surface.json", folder / "fisher_block.safetensors"
    if surface.is_file() and known.issuperset((found := json.loads(surface.read_text()))["of"]):
        plot_surface(found, folder / "surface.png")
        drawn += ["surface.json", "surface.png"]
    if block.is_file():
        with safe_open(block, "pt") as file:
            of = file.metadata()["of"]
        if of in known:
            plot_fisher_block(load_file(block), folder / "fisher_block.png")
            drawn += [block.name, "fisher_block.png"]
    return drawn
