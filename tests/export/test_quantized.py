from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_cap.errors import ConfigError, ExportError
from lightning_cap.export import ONNX, QDQ, Exporter, ExportRecord, Safetensors, TorchAO, quantized
from lightning_cap.export.batches import call, output_tensors
from lightning_cap.quantization.layers import fake_quantized, prepare
from lightning_cap.utilities.records import read_records
from tests.support import anything
from tests.support.quantizing import features, quantized_net, sparse_net

pytest.importorskip("torchao")
KINDS = [TorchAO, QDQ]


def made(kind: type[Exporter]) -> Exporter:
    for package in kind.packages:
        pytest.importorskip(package)
    return kind()


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_does_what_the_fake_quantized_model_does(kind: type[Exporter], tmp_path: Path) -> None:
    exporter, net = made(kind), quantized_net()
    path = tmp_path / f"model{exporter.suffix}"
    before = copy.deepcopy(net.state_dict())
    record = exporter.export(net, path, features(), goal=0.5)
    assert read_records(path.with_name("exports.jsonl"), ExportRecord) == [record]
    assert (record.format, record.weights, record.zeros_equal) == (kind.format, 3, 3)
    assert record.difference is not None
    assert record.difference <= exporter.tolerance == 0.05 == record.tolerance
    run = exporter.runner(path, net, threads=1)
    for number in (1, 2, 7):  # any batch
        torch.testing.assert_close(run(features(number)), net(features(number)), rtol=1e-3, atol=1e-3)
    assert (run(features()) - sparse_net()(features())).abs().max() > 1e-4  # it is rounded
    assert list(fake_quantized(net)) == ["0", "2", "4"]
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


def test_torchao_alone_loads_its_file(tmp_path: Path) -> None:
    net = quantized_net()
    TorchAO().export(net, tmp_path / "m.torchao.pt", features())
    other = sparse_net(0.0)
    held = torch.load(tmp_path / "m.torchao.pt", weights_only=True)
    other.load_state_dict(held, assign=True)
    torch.testing.assert_close(other(features()), net(features()), rtol=1e-3, atol=1e-3)
    assert held["0.weight"].qdata.dtype == torch.int8
    assert (held["0.weight"].qdata[net[0].weight == 0] == 0).all()
    assert list(held) == list(net.state_dict())


def test_qdq_has_integers_with_the_scales_of_training(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    net = quantized_net()
    made(QDQ).export(net, tmp_path / "m.qdq.onnx", features())
    graph = onnx.load(str(tmp_path / "m.qdq.onnx")).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 3
    assert kinds.count("DequantizeLinear") == 6  # of weights, and of inputs
    held = {entry.name: torch.from_numpy(onnx.numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    for name, layer in fake_quantized(net).items():
        integers, scale = held[f"{name}.weight"], held[f"{name}.scale"]
        assert integers.dtype == torch.int8
        assert (integers[layer.weight == 0] == 0).all()
        rounded = layer.weight_fake_quantizer(layer.weight)
        torch.testing.assert_close(integers * scale[:, None], rounded, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_layers_without_bias(kind: type[Exporter], tmp_path: Path) -> None:
    """Inputs of more dimensions; part of the layers stays in float; a token that is all zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9, bias=False), nn.GELU(), nn.Linear(9, 4), nn.Conv1d(5, 2, 1)).eval()
    prepare(net, ["0"])
    x = torch.randn(3, 5, 6)
    x[0, 2] = 0
    exporter = made(kind)
    record = exporter.export(net, tmp_path / f"m{exporter.suffix}", x)
    assert record.inputs == 3
    if kind is QDQ:
        static = QDQ(static=True)
        assert static.export(net, tmp_path / "s.qdq.onnx", x).difference < 1e-5  # type: ignore[operator]
        found = static.runner(tmp_path / "s.qdq.onnx")(x) - net(x)
        assert 1e-4 < found.abs().max() < 0.1  # beside what was trained


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_quantized_layers(kind: type[Exporter], tmp_path: Path) -> None:
    exporter = made(kind)
    with pytest.raises(ConfigError, match=f"to='{kind.format}': no layer of the model was trained with int8 weights"):
        exporter.export(sparse_net(), tmp_path / f"m{exporter.suffix}", features())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_package(kind: type[Exporter], monkeypatch: pytest.MonkeyPatch) -> None:
    find = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchao" else find(name))
    with pytest.raises(ConfigError, match=rf"to='{kind.format}' needs the package torchao.*\[.*quantization\]"):
        kind().require_packages()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_dense_model_takes_in_the_same_format(kind: type[Exporter], tmp_path: Path) -> None:
    net = sparse_net()
    run = made(kind).dense_runner(net, tmp_path, features())
    torch.testing.assert_close(run(features()), net(features()), rtol=1e-4, atol=1e-5)


def statically(net: nn.Sequential, x: torch.Tensor, ranges: list[tuple[float, float]]) -> torch.Tensor:
    """Outputs ``(n, 3)`` with the inputs of each layer rounded to 256 values over a range, in float64."""
    x = x.double()
    for place, (low, high) in zip((0, 2, 4), ranges, strict=True):
        layer: Any = net[place]
        scale = (high - low) / 255
        zero = round(-low / scale)
        x = ((x / scale).round().add(zero).clamp(0, 255) - zero) * scale
        x = x @ layer.weight_fake_quantizer(layer.weight).double().T + layer.bias.double()
        x = x if place == 4 else x.relu()
    return x


def test_constant_scales(tmp_path: Path) -> None:
    """Of the range of inputs of each layer; onnxruntime computes the products in integers."""
    exporter, net = QDQ(static=True), quantized_net()
    for package in exporter.packages:
        pytest.importorskip(package)
    import onnx
    import onnxruntime

    ranges = []
    for layer in net:  # as torchao's own rounding leaves them
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(
                lambda _, x: ranges.append((min(float(x[0].min()), 0), max(float(x[0].max()), 0)))
            )
    net(features())
    net = quantized_net()
    path = tmp_path / "m.qdq.onnx"
    record = exporter.export(net, path, features())
    assert (record.weights, record.zeros_equal, record.inputs) == (3, 3, 6)
    run = exporter.runner(path)
    with torch.no_grad():
        for x in (features(), 100 * features(4)):  # some beyond the range
            torch.testing.assert_close(run(x).double(), statically(net, x, ranges), rtol=1e-4, atol=1e-4)
    assert torch.equal(net(features()), quantized_net()(features()))  # the model is as it was
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert sum(kind in ("MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "MatMulInteger") for kind in kinds) == 3
    assert not {"MatMul", "Gemm"} & set(kinds)


def test_constant_scales_say_how_far_they_move_the_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("lightning_cap.export.quantized.rank_zero_info", told.append)
    made(QDQ)
    QDQ(static=True).export(quantized_net(), tmp_path / "m.qdq.onnx", features())
    (line,) = told
    assert re.fullmatch(
        r"Constant scales from 6 inputs move the outputs by \d\.\d% of the largest one at the most\.", line
    )


def test_where_rounding_moves_the_outputs_more_the_file_may_differ_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(QDQ)
    exporter, net = QDQ(1e-9), quantized_net()
    with torch.no_grad():
        expected, plain = net(features()), sparse_net()(features())
    moved = float((expected - plain).abs().max() / expected.abs().max())
    path = tmp_path / "m.qdq.onnx"
    assert exporter.export(net, path, features()).tolerance == pytest.approx(1.5 * moved, rel=1e-4)
    assert QDQ(0.4).allowed(net, features(), [expected]) == 0.4
    assert exporter.allowed(net, features(), [expected * 100]) == pytest.approx(0.5)  # rounding breaks such a model
    assert TorchAO(1e-3).allowed(net, features(), [expected * 100]) == 1e-3  # torch rounds as torch does
    run = exporter.runner
    monkeypatch.setattr(
        exporter, "runner", lambda *a, **k: lambda x: run(*a, **k)(x) + 1.6 * moved * expected.abs().max()
    )
    with pytest.raises(ExportError, match=f"more than tolerance={1.5 * moved:.3g}"):
        exporter.export(net, path, features())


@pytest.mark.parametrize("make", [TorchAO, QDQ, lambda: QDQ(static=True)])
def test_a_pruned_weight_that_is_no_zero_in_the_file_is_found(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(QDQ)
    exporter, net, path = make(), quantized_net(), tmp_path / f"m{make().suffix}"
    record = exporter.export(net, path, features())
    assert (record.weights, record.zeros_equal) == (3, 3)
    convert = quantized._converted

    def broken(model: nn.Module) -> nn.Module:
        own: Any = convert(model)
        zero = (own[0].weight.qdata == 0).nonzero()[0]
        own[0].weight.qdata[tuple(zero)] = 1
        return own  # type: ignore[no-any-return]

    monkeypatch.setattr(quantized, "_converted", broken)
    with pytest.raises(
        ExportError, match=r"integers of '0' in the file are not those|zeros of '0.weight' are not zero"
    ):
        exporter.export(net, path, features())


@pytest.mark.parametrize("kind", [Safetensors, ONNX])
def test_formats_of_floats_hold_what_it_was_trained_to(kind: type[Exporter], tmp_path: Path) -> None:
    exporter = made(kind)
    record = exporter.export(quantized_net(), tmp_path / f"m{exporter.suffix}", features())
    assert record.zeros_equal == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_named_inputs(kind: type[Exporter], tmp_path: Path) -> None:
    exporter, model = made(kind), anything.made("words")
    prepare(model, ["first", "head"])
    path = tmp_path / f"m{exporter.suffix}"
    record = exporter.export(model, path, anything.words(5))
    assert record.weights == record.zeros_equal == 3
    outputs, expected = exporter.runner(path, model)(anything.words(2)), call(model, anything.words(2))
    torch.testing.assert_close(outputs, output_tensors(expected), rtol=1e-3, atol=1e-4)
