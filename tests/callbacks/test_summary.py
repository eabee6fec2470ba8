from __future__ import annotations

from io import StringIO

from rich.console import Console

from lightning_cap.callbacks.cycle import CycleRecord
from lightning_cap.callbacks.summary import print_table


def test_names_are_printed_as_they_are() -> None:
    told = StringIO()
    record = CycleRecord(goal=0.5, epochs=1, value=0.9, sparsity=0.5, checkpoint="runs/[/red]/[bold]a.ckpt")
    print_table([record], "acc[/red]", Console(file=told, width=120))
    for text in ("[bold]a.ckpt", "in runs/[/red]", "acc[/red]"):
        assert text in told.getvalue()
