"""What holds of every exporter; more of one is in its own file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_cap.errors import ConfigError, ExportError
from lightning_cap.export import ONNX, PT2, Compressed, Exporter, ExportRecord, OpenVINO, Safetensors
from lightning_cap.export.exporter import size_on_disk
from lightning_cap.utilities.records import read_records
from tests.support.exporting import images, small_convnet

EXPORTERS = [Safetensors, Compressed, PT2, ONNX, OpenVINO]


def made(kind: type[Exporter]) -> Exporter:
    for package in kind.packages:
        pytest.importorskip(package)
    return kind()


@pytest.mark.parametrize("kind", EXPORTERS)
def test_the_file_does_what_the_model_does(kind: type[Exporter], tmp_path: Path) -> None:
    exporter, model = made(kind), small_convnet()
    path = tmp_path / "new" / f"model{exporter.suffix}"
    record = exporter.export(model, path, images(), goal=0.6)
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([path.name, "exports.jsonl"])
    assert read_records(path.with_name("exports.jsonl"), ExportRecord) == [record]
    assert (record.format, record.path, record.goal, record.bytes) == (kind.format, path.name, 0.6, size_on_disk(path))
    assert (record.weights, record.zeros_equal, record.inputs) == (4, 4, 4)
    assert record.difference is not None
    assert record.difference <= exporter.tolerance == record.tolerance
    assert abs(record.sparsity - 0.6) < 0.02
    run = exporter.runner(path, model, threads=1)
    for number in (1, 2, 7):  # any batch
        torch.testing.assert_close(run(images(number)), model(images(number)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", EXPORTERS)
def test_the_model_is_not_changed(kind: type[Exporter], tmp_path: Path) -> None:
    exporter, model = made(kind), small_convnet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exporter.export(model, tmp_path / f"model{exporter.suffix}", images())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class _OtherOutputs(Safetensors):
    def write(self, model: nn.Module, path: Path, inputs: Tensor, metadata: Mapping[str, str]) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        super().write(model, path, inputs, metadata)


class _Full(Safetensors):
    def write(self, model: nn.Module, path: Path, inputs: Tensor, metadata: Mapping[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")


class _FullInRust(Safetensors):
    def write(self, model: nn.Module, path: Path, inputs: Tensor, metadata: Mapping[str, str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lightning_cap.export.safetensors.save_file", _refuse)
            super().write(model, path, inputs, metadata)


class _FullInCpp(Safetensors):
    def write(self, model: nn.Module, path: Path, inputs: Tensor, metadata: Mapping[str, str]) -> None:
        path.write_bytes(b"half")
        path.with_name("space").mkdir()  # the system refuses to write there
        raise RuntimeError("iostream error")


def _refuse(*_: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


class _Untraceable(Safetensors):
    def write(self, model: nn.Module, path: Path, inputs: Tensor, metadata: Mapping[str, str]) -> None:
        raise NotImplementedError("this\noperator")


class _Needing(Safetensors):
    packages, extra = ("no_such_package",), "nothing"


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        (_OtherOutputs, ExportError, "outputs of the file differ from torch's by .* tolerance=0.0001"),
        (_Full, ConfigError, "cannot be written .No space left on device"),
        (_FullInRust, ConfigError, "cannot be written .No space left on device"),
        (_FullInCpp, ConfigError, "cannot be written .Is a directory"),
        (_Untraceable, ExportError, "cannot be written in this format .NotImplementedError: this operator"),
        (_Needing, ConfigError, r"no_such_package, not installed here: pip install 'lightning-cap\[nothing\]'"),
    ],
)
def test_what_fails_leaves_no_file_and_keeps_an_earlier_one(
    kind: type[Exporter], error: type[Exception], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    for earlier in (False, True):
        if earlier:
            path.write_bytes(b"earlier")
        with pytest.raises(error, match=words):
            kind().export(small_convnet(), path, images())
        assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"earlier"] * earlier


def test_a_full_disk_while_torch_saves_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)  # torch's own writer would end the process
    with pytest.raises(ConfigError, match=r"cannot be written .No space left on device"):
        PT2().export(small_convnet(), tmp_path / "model.pt2", images())
    assert not list(tmp_path.iterdir())


def test_zeros_that_are_not_zero_in_the_file(tmp_path: Path) -> None:
    class OtherZeros(Safetensors):
        def stored(self, path: Path | str) -> dict[str, Tensor]:
            return {name: value + 1e-9 for name, value in super().stored(path).items() if value.is_floating_point()}

    with pytest.raises(ExportError, match=r"zeros of '0.weight' are not zero in the file"):
        OtherZeros().export(small_convnet(), tmp_path / "model.safetensors", images())
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_no_tensor(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    for model, words in ((Two(), "it gives tuple"), (nn.Linear(3, 2), "cannot be run on it")):
        with pytest.raises(ExportError, match=words):
            Safetensors().export(model, tmp_path / "model.safetensors", images())
    broken = small_convnet()
    next(broken.parameters()).data.fill_(torch.nan)
    with pytest.raises(ExportError, match="not finite"):
        Safetensors().export(broken, tmp_path / "model.safetensors", images())
    assert not list(tmp_path.iterdir())


def test_every_exporter_has_a_name_and_an_extra_for_its_packages() -> None:
    assert len({kind.format for kind in EXPORTERS}) == len({kind.suffix for kind in EXPORTERS}) == len(EXPORTERS)
    assert all(bool(kind.packages) == bool(kind.extra) for kind in EXPORTERS)
