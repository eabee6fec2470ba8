"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_cap.trainer.run_records import CycleRecord


def print_table(history: Sequence[CycleRecord], metric: str | None, console: Console | None = None) -> None:
    """Print the model before the first event and every pruned one: metric, what is saved, real sparsity, checkpoint.

    Args:
        history: `CAPPruningCallback.history`.
        metric: Name of the column of values.
        console: Where to. Default: standard output.
    """
    folders = {str(Path(record.checkpoint).parent) for record in history if record.checkpoint}
    caption = Text(f"in {', '.join(sorted(folders))}") if folders else None
    table = Table(title="Pruned models", caption=caption)
    saved = [record.saving for record in history if record.saving is not None]
    costs = [saved[0].cost, "predicted"] if saved else []
    for name in ("goal", metric or "metric", *costs, "real sparsity", "epochs trained"):
        table.add_column(Text(name), justify="right")
    table.add_column("checkpoint", overflow="fold")
    for record in history:
        table.add_row(
            ("start" if record.sparsity else "dense")
            if record.goal == 0
            else f"{100 * record.goal:.4g} %" + (" best" if record.best else ""),
            "-" if record.value is None else f"{record.value:.4f}",
            *(_saved(record) if costs else ()),
            f"{100 * record.sparsity:.2f} %",
            str(record.epochs),
            Text(Path(record.checkpoint).name or "-"),
        )
    (console or Console()).print(table)


def _saved(record: CycleRecord) -> tuple[str, str]:
    return ("-", "-") if record.saving is None else (f"{record.saving.share:.2f}", record.saving.left)
