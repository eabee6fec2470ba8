"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_cap.callbacks.cycle import Row


def print_table(rows: Sequence[Row], metric: str | None, console: Console | None = None) -> None:
    """Print the dense model and every pruned one: accuracy, real sparsity, checkpoint.

    Args:
        rows: `CAPPruningCallback.history`.
        metric: Name of the accuracy column.
        console: Where to. Default: standard output.
    """
    folders = {str(Path(row["checkpoint"]).parent) for row in rows if row["checkpoint"]}
    table = Table(title="Pruned models", caption=f"in {', '.join(sorted(folders))}" if folders else None)
    for name in ("target", metric or "accuracy", "real sparsity", "epoch"):
        table.add_column(name, justify="right")
    table.add_column("checkpoint", overflow="fold")
    for row in rows:
        table.add_row(
            "dense" if row["target"] == 0 else f"{100 * row['target']:.4g} %" + (" best" if row["best"] else ""),
            "-" if row["value"] is None else f"{row['value']:.4f}",
            f"{100 * row['sparsity']:.2f} %",
            str(row["epoch"]),
            Path(row["checkpoint"]).name or "-",
        )
    (console or Console()).print(table)
