from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from lightning_cap.report.sweep import print_sweep
from lightning_cap.trainer.run_records import FinetunedRecord


def printed(capsys: pytest.CaptureFixture[str], *changes: dict[str, Any]) -> str:
    record: dict[str, Any] = {
        "goal": 0.6, "sparsity": 0.6, "flops_saved": 0.526, "metric": "val/acc", "before": 0.733, "after": 0.736, "epochs": 100,
        "source": "runs/a/sparsity=0.60-best.ckpt",
    }  # fmt: skip
    print_sweep([FinetunedRecord(**{**record, **one}) for one in changes], "runs/a/finetuned", Console(width=140))
    return capsys.readouterr().out


def test_a_line_is_as_in_the_papers_table(capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, {}, {"after": 0.72}, {"after": 0.733}, {"flops_saved": None, "after": None})
    assert "val/acc (%)" in told
    lines = [line.split("│")[1:-1] for line in told.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["60.0", "52.6", "73.3 (73.6 ↑)", "+0.3", "100", "sparsity=0.60-best.ckpt"],
        ["60.0", "52.6", "73.3 (72.0 ↓)", "-1.3", "100", "sparsity=0.60-best.ckpt"],
        ["60.0", "52.6", "73.3 (73.3)", "+0.0", "100", "sparsity=0.60-best.ckpt"],
        ["60.0", "-", "73.3 (-)", "-", "100", "sparsity=0.60-best.ckpt"],
    ]
    assert "in runs/a/finetuned" in told


def test_a_loss_is_no_percentage(capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, {"metric": "val/loss", "before": 1.25, "after": 1.125})
    assert "1.2500 (1.1250 ↓)" in told
    assert "-0.1250" in told
    assert "val/loss (%)" not in told
