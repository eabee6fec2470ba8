"""What int8 costs on the digits, by a shorter run than that of `configs/digits_quantized.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_cap.callbacks.qat import quantized_layers
from lightning_cap.cli import main
from lightning_cap.export import ExportRecord
from lightning_cap.utilities.records import read_records
from tests.support import ROOT

pytest.importorskip("torchao")


def fit(name: str, folder: Path, *args: str, quantized: bool = False) -> tuple[Path, dict[str, Any]]:
    """The folder of its checkpoints, and the last of them."""
    pruner = {"class_path": "lightning_cap.pruners.CAP", "init_args": {"block_size": 64, "num_gradients": 512}}
    steps = {"class_path": "lightning_cap.schedules.SparsitySteps", "init_args": {"steps": {18: 0.5, 24: 0.75}}}
    callbacks: list[dict[str, Any]] = [
        {"class_path": "lightning_cap.CAPPruningCallback", "init_args": {"schedule": steps, "pruner": pruner}}
    ]
    if quantized:
        callbacks.append({"class_path": "lightning_cap.QATCallback", "init_args": {"epoch": 26}})
    settings = {
        "max_epochs": 32,
        "accelerator": "cpu",
        "logger": {"init_args": {"name": name}},
        "callbacks+": callbacks,
    }
    config = folder / f"{name}.yaml"
    base = [str(ROOT / "configs/parts/digits_training.yaml")]
    config.write_text(yaml.safe_dump({"base": base, "trainer": settings}))
    main(["fit", f"--config={config}", *args])
    found = folder / "runs" / name / "version_0/checkpoints"
    return found, torch.load(found / "sparsity=0.75.ckpt", weights_only=True)


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
    folder, sparse = fit("sparse", tmp_path)
    folder, quantized = fit("quantized", tmp_path, f"--ckpt_path={folder / 'sparsity=0.50.ckpt'}", quantized=True)
    print(f"sparse {accuracy(sparse):.2f} %, with int8 {accuracy(quantized):.2f} %")
    assert len(quantized_layers(quantized["callbacks"])) == 4 * 4 + 1
    assert accuracy(sparse) > 93
    assert accuracy(quantized) >= accuracy(sparse) - 0.5
    for to in ("torchao", "qdq"):
        main(["export", str(folder / "sparsity=0.75.ckpt"), "--to", to, f"--config={tmp_path / 'quantized.yaml'}"])
    for record in read_records(folder / "export/exports.jsonl", ExportRecord):
        assert record.weights == record.zeros_equal > 0
        assert record.dense_bytes is not None
        assert record.bytes < 0.5 * record.dense_bytes
