from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_cap.cli import main
from lightning_cap.cli.checkpoint_model import CheckpointModel
from lightning_cap.cli.inputs import real_inputs
from lightning_cap.errors import DataError
from lightning_cap.export import ExportRecord
from lightning_cap.export.benchmark import benchmark
from lightning_cap.export.records import BenchmarkRecord
from lightning_cap.utilities.records import read_records
from tests.support.anything import Sentences, words
from tests.support.checkpoints import checkpoint


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A checkpoint of a model that takes words and a mask by name."""
    torch.save(checkpoint(state_dict=Sentences().state_dict()), tmp_path / "a.ckpt")
    return str(tmp_path / "a.ckpt")


def records(folder: Path) -> list[ExportRecord]:
    return read_records(folder / "export" / "exports.jsonl", ExportRecord)


def test_arguments_in_a_file(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_cap.cli import export as command

    monkeypatch.setattr(command, "benchmark", lambda *args, **given: benchmark(*args, **given, seconds=0.01))
    named = words(40)
    torch.save(named, tmp_path / "named.pt")
    torch.save((named["input_ids"], named["attention_mask"]), tmp_path / "tuple.pt")
    given = ["--to=safetensors", "--module=tests.support.anything.Sentences"]
    main(["export", saved, *given, f"--input={tmp_path}/tuple.pt"])
    main(["export", saved, *given, f"--input={tmp_path}/named.pt", "--benchmark", "--threads=1"])
    (record,) = records(tmp_path)
    assert (record.inputs, record.zeros_equal) == (32, 3)
    measured = read_records(tmp_path / "export" / "benchmarks.jsonl", BenchmarkRecord)
    assert [record.batch_size for record in measured] == [1, 1, 32, 32]
    assert all(record.flops for record in measured)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({}, r"there is no tensor \(n, ...\) in \{\}"),
        ((torch.tensor(1.0),), "there is no tensor"),
        ({"x": torch.ones(2, 3) / 0}, "'x' has values that are not finite"),
        ({"x": torch.ones(2, 3), "mask": [b"a"]}, "'mask_0' is a bytes. Give tensors"),
        ("text", "it holds a str. Give a tensor .*, or the arguments of the model in a tuple or dict"),
        (torch.ones(3), r"a tensor of shape \(3,\) and type torch.float32"),
    ],
)
def test_a_file_of_something_else(held: Any, words: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "x.pt")
    with pytest.raises(DataError, match=rf"--input='.*x\.pt': .*{words}"):
        real_inputs(CheckpointModel(nn.Identity(), None, {}, None), False, None, tmp_path / "x.pt")


def configured(folder: Path, **data: Any) -> str:
    path = folder / "run.yaml"
    settings = {
        name: {"class_path": f"tests.support.anything.Sentences{kind}"}
        for name, kind in (("model", ""), ("data", "Data"))
    }
    settings["data"]["init_args"] = data
    path.write_text(yaml.safe_dump(settings))
    return f"--config={path}"


@pytest.mark.parametrize(("last", "inputs"), [(6, 24), (5, 16)])
def test_mappings_of_the_validation_data(
    saved: str, tmp_path: Path, last: int, inputs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the model takes by name, without labels and strings; batches of another length are left out."""
    main(["export", saved, "--to=safetensors", configured(tmp_path, last=last)])
    assert [record.inputs for record in records(tmp_path)] == [inputs]
    assert "validation data of" in capsys.readouterr().out


def test_mappings_of_something_else(saved: str, tmp_path: Path) -> None:
    told = r"data: a batch is a mapping with \['attention_mask', 'scale'.*_Words takes \['input_ids', .*Give --input FILE of a"
    with pytest.raises(SystemExit, match=told):
        main(["export", saved, "--to=safetensors", configured(tmp_path, left_out="input_ids")])
    assert not (tmp_path / "export").exists()
