from __future__ import annotations

from io import StringIO

from rich.console import Console

from lightning_cap.callbacks.summary import print_table
from lightning_cap.trainer.records import Saving
from lightning_cap.trainer.run_records import CycleRecord


def test_names_are_printed_as_they_are() -> None:
    told = StringIO()
    record = CycleRecord(goal=0.5, epochs=1, value=0.9, sparsity=0.5, checkpoint="runs/[/red]/[bold]a.ckpt")
    print_table([record], "acc[/red]", Console(file=told, width=120))
    for text in ("[bold]a.ckpt", "in runs/[/red]", "acc[/red]"):
        assert text in told.getvalue()


def test_what_is_saved_stands_beside_the_sparsity() -> None:
    told = StringIO()
    lines = [
        CycleRecord(goal, 1, 0.9, goal / 2, saving=Saving("latency", goal, price, "ms"))
        for goal, price in ((0.0, 24.6), (0.5, 12.3))
    ]
    print_table([*lines, CycleRecord(0.75, 2, None, 0.5)], "acc", Console(file=told, width=120))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.getvalue().splitlines() if "│" in line]
    assert rows[1] == ["50 %", "0.9000", "0.50", "12.3 ms", "25.00 %", "1", "-"]
    assert rows[2][2:4] == ["-", "-"]
    assert Saving("flops", 0.5, 629.1e6, "FLOPs").left == "629 M FLOPs"
