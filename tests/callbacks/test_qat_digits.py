"""The digits of `configs/digits_quantized.yaml`: what int8 costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_cap.callbacks.qat import quantized_layers
from lightning_cap.cli import main
from lightning_cap.export import ExportRecord
from lightning_cap.utilities.records import read_records
from tests.support import ROOT

pytest.importorskip("torchao")


def fit(name: str, folder: Path, *args: str) -> tuple[Path, dict[str, Any]]:
    """The folder of its checkpoints, and the last of them."""
    main(["fit", f"--config={ROOT}/configs/{name}.yaml", "--trainer.accelerator=cpu", *args])
    found = folder / "runs" / name / "version_0/checkpoints"
    return found, torch.load(found / "sparsity=0.90.ckpt", weights_only=True)


def accuracy(checkpoint: dict[str, Any]) -> float:
    """At the end of the last cycle, in percent."""
    [state] = [held for name, held in checkpoint["callbacks"].items() if name.startswith("CAPPruningCallback")]
    value: float = 100 * state["history"][-1]["value"]
    return value


@pytest.mark.slow
def test_int8_costs_at_most_half_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run with int8 goes on from the one without it, before its last event."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-cap"])
    folder, sparse = fit("digits_gradual", tmp_path)
    folder, quantized = fit("digits_quantized", tmp_path, f"--ckpt_path={folder / 'sparsity=0.75.ckpt'}")
    assert len(quantized_layers(quantized["callbacks"])) == 4 * 4 + 1
    assert accuracy(sparse) > 95
    assert accuracy(quantized) >= accuracy(sparse) - 0.5
    for to in ("torchao", "qdq"):
        main(["export", str(folder / "sparsity=0.90.ckpt"), "--to", to])
    for record in read_records(folder / "export/exports.jsonl", ExportRecord):
        assert record.weights == record.zeros_equal > 0
        assert record.dense_bytes is not None
        assert record.bytes < 0.5 * record.dense_bytes
