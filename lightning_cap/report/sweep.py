"""Table and plot of a one-shot sweep: accuracy and predicted loss over sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table


def print_sweep(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print one line for each sparsity.

    Args:
        rows: What `lightning_cap.oneshot.sweep` returned.
        console: Where to. Default: standard output.
    """
    metrics = list(rows[0]["metrics"])
    table = Table(title="One-shot pruning")
    for name in ("sparsity", "predicted loss", *metrics):
        table.add_column(name, justify="right")
    for row in rows:
        sparsity = "dense" if row["target"] == 0 else f"{row['sparsity']:.4f}"
        table.add_row(sparsity, f"{row['predicted_loss']:.4g}", *(f"{row['metrics'][name]:.4f}" for name in metrics))
    (console or Console()).print(table)


def plot_sweep(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy (or, without one, the first metric) and predicted loss over sparsity into an image file.

    Args:
        rows: What `lightning_cap.oneshot.sweep` returned.
        path: A ``.png``, ``.svg`` or ``.pdf`` file.
    """
    metrics = list(rows[0]["metrics"])
    metric = next((name for name in metrics if "acc" in name.lower()), metrics[0] if metrics else None)
    sparsity = [100 * row["sparsity"] for row in rows]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    if metric is not None:
        left.plot(sparsity, [row["metrics"][metric] for row in rows], marker="o")
        left.set_title(metric)
    pruned = [row for row in rows if row["predicted_loss"] > 0]
    right.plot(
        [100 * row["sparsity"] for row in pruned], [row["predicted_loss"] for row in pruned], marker="o", color="C1"
    )
    right.set_yscale("log")
    right.set_title("predicted loss increase")
    for axes in (left, right):
        axes.set_xlabel("sparsity (%)")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
