"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_cap.callbacks.cycle import CycleRecord


def print_table(history: Sequence[CycleRecord], metric: str | None, console: Console | None = None) -> None:
    """Print the dense model and every pruned one: accuracy, real sparsity, checkpoint.

    Args:
        history: `CAPPruningCallback.history`.
        metric: Name of the accuracy column.
        console: Where to. Default: standard output.
    """
    folders = {str(Path(record.checkpoint).parent) for record in history if record.checkpoint}
    table = Table(title="Pruned models", caption=f"in {', '.join(sorted(folders))}" if folders else None)
    for name in ("goal", metric or "accuracy", "real sparsity", "epoch"):
        table.add_column(name, justify="right")
    table.add_column("checkpoint", overflow="fold")
    for record in history:
        table.add_row(
            "dense" if record.goal == 0 else f"{100 * record.goal:.4g} %" + (" best" if record.best else ""),
            "-" if record.value is None else f"{record.value:.4f}",
            f"{100 * record.sparsity:.2f} %",
            str(record.epoch),
            Path(record.checkpoint).name or "-",
        )
    (console or Console()).print(table)
