"""Draws all pictures of a comparison into its folder."""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_cap.comparison.records import SURFACE, SurfaceRecord
from lightning_cap.errors import DataError
from lightning_cap.report.curves import plot_accuracy, plot_grid, plot_losses
from lightning_cap.report.heatmaps import plot_fisher_block, plot_surface
from lightning_cap.report.mask_plots import mask_agreement, plot_agreement, plot_layers, seed_note
from lightning_cap.report.records import Records, as_given, by_label, counted, grid_settings
from lightning_cap.report.style import styles
from lightning_cap.utilities.files import save_json
from lightning_cap.utilities.records import read_record

FISHER_BLOCK = "fisher_block.safetensors"

_log = logging.getLogger(__name__)


def draw_all(records: Records, folder: Path) -> list[str]:
    """Draw all figures that the records have something for.

    Args:
        records: What `lightning_cap.comparison.compare` returned.
        folder: Which has their masks, ``surface.json`` and ``fisher_block.safetensors``; the pictures go there.

    Returns:
        The names of the files.
    """
    drawn = ["accuracy.png", "layers.png"]
    plot_accuracy(records, folder / "accuracy.png")
    plot_layers(records, folder / "layers.png")
    if plot_losses(records, folder / "losses.png"):
        drawn.append("losses.png")
    agreement = mask_agreement(records, folder)
    if agreement:
        save_json(folder / "iou.json", agreement)
        plot_agreement(agreement, folder / "iou.png", seed_note(records), counted(records))
        drawn += ["iou.json", "iou.png"]
    for setting in grid_settings(records):
        plot_grid(records, setting, folder / f"grid-{setting}.png")
        drawn.append(f"grid-{setting}.png")
    return drawn + _draw_planes(records, folder)


def _draw_planes(records: Records, folder: Path) -> list[str]:
    """The loss surface and the Fisher block, if they are there and of these records."""
    known, drawn = {record.fingerprint for record in records}, []
    surface, block = _surface(folder / SURFACE), folder / FISHER_BLOCK
    if surface is not None and known.issuperset(surface.of):
        plot_surface(surface, folder / "surface.png", styles(list(by_label(as_given(records)))), counted(records))
        drawn += [SURFACE, "surface.png"]
    of, blocks = read_fisher_block(block)
    if of in known:
        plot_fisher_block(blocks, folder / "fisher_block.png")
        drawn += [block.name, "fisher_block.png"]
    return drawn


def read_fisher_block(path: Path) -> tuple[str, dict[str, Tensor]]:
    """What the average blocks are of, and the blocks; nothing of what is no file of them, which is logged."""
    try:
        if path.is_file():
            with safe_open(path, "pt") as file:
                return (file.metadata() or {}).get("of", ""), {"all": file.get_tensor("all")}
    except (OSError, SafetensorError) as error:
        _log.warning("The average Fisher block in %s is not drawn: %s", path, error)
    return "", {}


def _surface(path: Path) -> SurfaceRecord | None:
    """That of an earlier version is left out, which is logged: it is no reason to lose the other pictures."""
    try:
        return read_record(path, SurfaceRecord) if path.exists() else None
    except DataError as error:
        _log.warning("The loss surface is not drawn: %s", error)
        return None
