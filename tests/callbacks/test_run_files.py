from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_cap.callbacks.run_files import RunFiles
from lightning_cap.trainer.records import EventRecord
from lightning_cap.utilities.records import read_records
from tests.support.stopping import CrashError, StopAfter
from tests.support.toy import Toy, callback, loaders, trainer


def fit(folder: Path, sparsity: float = 0.5, ckpt_path: str | None = None, epochs: int = 1) -> None:
    cb = callback({0: sparsity}, dirpath=str(folder / "out"))
    trainer(folder, cb, max_epochs=epochs).fit(Toy(), **loaders(), ckpt_path=ckpt_path)


def test_a_second_run_leaves_the_files_of_the_first(tmp_path: Path) -> None:
    fit(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.name != "exports.jsonl"}
    records = {"cycles.jsonl", "events.jsonl", "run.jsonl"}
    assert before.keys() == {*records, "sparsity=0.50.ckpt", "sparsity=0.50.safetensors"}
    fit(tmp_path)
    fit(tmp_path, 0.75)
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert all(after[name] == content for name, content in before.items())
    assert after.keys() - before.keys() == {
        "exports.jsonl",
        *(name.replace(".", f"-v{i}.") for name in records for i in (1, 2)),
        *("sparsity=0.50-v1.ckpt", "sparsity=0.50-v1.safetensors"),
        *("sparsity=0.75-v2.ckpt", "sparsity=0.75-v2.safetensors"),
    }


def test_a_resumed_run_goes_on_with_its_own_files(tmp_path: Path) -> None:
    fit(tmp_path)
    fit(tmp_path)
    again = tmp_path / "out/sparsity=0.50-v1.ckpt"
    fit(tmp_path, ckpt_path=str(again), epochs=2)
    assert not list(tmp_path.rglob("*-v2*"))
    assert torch.load(again, weights_only=True)["epoch"] == 1
    assert len(read_records(tmp_path / "out/events-v1.jsonl", EventRecord)) == 1


def test_a_run_that_has_begun_keeps_its_names(tmp_path: Path) -> None:
    """It is stopped before its first event, and another one comes: when the first goes on, its names are free."""
    cut = callback({1: 0.5}, dirpath=str(tmp_path / "out"))
    with pytest.raises(CrashError):
        trainer(tmp_path, cut, StopAfter(0), max_epochs=2).fit(Toy(), **loaders())
    fit(tmp_path)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"events.jsonl", "events-v1.jsonl", "sparsity=0.50-v1.ckpt"} <= names
    assert "sparsity=0.50.ckpt" not in names


def test_names(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, "-v3")
    assert files.of_cycle(0.5, best=True)[0].name == "sparsity=0.50-best-v3.ckpt"
    assert not files.used([0.5])
    files.of_cycle(0.5, best=True)[1].touch()
    assert files.used([0.25, 0.5])
    assert not files.used([0.25])
