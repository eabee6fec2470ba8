"""What holds of every exporter; more of one is in its own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_cap.errors import ConfigError, ExportError
from lightning_cap.export import ONNX, PT2, Compressed, Exporter, ExportRecord, OpenVINO, Safetensors
from lightning_cap.export.batches import call, output_tensors
from lightning_cap.export.exporter import size_on_disk
from lightning_cap.utilities.records import read_records
from tests.support.anything import INPUTS
from tests.support.anything import made as model_of
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
@pytest.mark.parametrize("name", INPUTS)
def test_models_that_take_or_give_more_than_one_tensor(kind: type[Exporter], name: str, tmp_path: Path) -> None:
    exporter, model, inputs = made(kind), model_of(name), INPUTS[name]
    path = tmp_path / f"model{exporter.suffix}"
    record = exporter.export(model, path, inputs(5))
    assert record.inputs == 5
    assert record.weights == record.zeros_equal > 0
    assert not model._forward_hooks
    run = exporter.runner(path, model)
    if name == "words":  # in any order
        turned = {key: inputs(2)[key] for key in reversed(inputs(2))}
        assert all(torch.equal(one, other) for one, other in zip(run(inputs(2)), run(turned), strict=True))
    for number in (1, 2, 7):
        outputs, expected = run(inputs(number)), output_tensors(call(model, inputs(number)))
        assert isinstance(outputs, Tensor) == (len(expected) == 1)
        torch.testing.assert_close(output_tensors(outputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "taken", "given"),
    [
        ("words", ["attention_mask", "input_ids"], ["logits", "linear", "first"]),
        ("pair", ["left", "right"], ["output_0", "output_1_0", "output_1_1"]),
        ("named", ["input"], ["out"]),
    ],
)
def test_names_in_onnx(name: str, taken: list[str], given: list[str], tmp_path: Path) -> None:
    """Those of the arguments and keys, though operators inside are called by some of them."""
    made(ONNX).export(model_of(name), tmp_path / "m.onnx", INPUTS[name](2))
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [[value.name for value in side] for side in (session.get_inputs(), session.get_outputs())] == [taken, given]


def test_a_program_needs_no_class_of_the_model(tmp_path: Path) -> None:
    """Outputs of classes that `transformers` registers with torch are lists in the file."""

    @dataclass
    class Found:
        boxes: Tensor
        scores: Tensor

    class Detector(nn.Module):
        def forward(self, x: Tensor) -> Found:
            return Found(boxes=x * 2, scores=x + 1)

    torch.export.register_dataclass(Found, serialized_type_name=f"{__name__}.Found")
    PT2().export(Detector(), tmp_path / "m.pt2", torch.randn(3, 2))
    assert torch.export.load(tmp_path / "m.pt2").call_spec.out_spec.type is list
    boxes, scores = PT2().runner(tmp_path / "m.pt2")(torch.ones(1, 2))
    assert (boxes.tolist(), scores.tolist()) == ([[2.0, 2.0]], [[2.0, 2.0]])


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


class _Giving(nn.Module):
    def __init__(self, give: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: Tensor) -> Any:
        return self.give(x)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear(3, 2), "cannot be run on it"),
        (
            _Giving(lambda x: {"loss": x.mean(), "logits": x}),
            "output 'loss' is a single number.*labels, out of example_input",
        ),
        (_Giving(lambda x: (x, x[0])), r"output 'output_1' has shape \(3, 8, 8\) for 4 inputs"),
        (_Giving(lambda x: {"x": x, "size": len(x)}), "output 'size' is a int. Only tensors with a row for each input"),
        (_Giving(lambda x: {"x": None}), "it gives dict without a tensor"),
        (_Giving(lambda x: [x, x / 0]), "not finite"),
    ],
)
def test_outputs_that_cannot_be_exported(model: nn.Module, words: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=words):
        Safetensors().export(model, tmp_path / "model.safetensors", images())
    assert not list(tmp_path.iterdir())


def test_a_number_of_rows_that_is_a_constant(tmp_path: Path) -> None:
    model = _Giving(lambda x: x + torch.zeros(1, 3, 8, 8).expand(len(x), -1, -1, -1))
    with pytest.raises(ExportError, match=r"Write x\.shape\[0\] in place of len\(x\)"):
        PT2().export(model, tmp_path / "model.pt2", images())
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_not_finite(tmp_path: Path) -> None:
    broken = small_convnet()
    next(broken.parameters()).data.fill_(torch.nan)
    with pytest.raises(ExportError, match="not finite"):
        Safetensors().export(broken, tmp_path / "model.safetensors", images())
    assert not list(tmp_path.iterdir())


def test_every_exporter_has_a_name_and_an_extra_for_its_packages() -> None:
    assert len({kind.format for kind in EXPORTERS}) == len({kind.suffix for kind in EXPORTERS}) == len(EXPORTERS)
    assert all(bool(kind.packages) == bool(kind.extra) for kind in EXPORTERS)
