"""The exporters of models that `QATCallback` has trained: the integers that fake quantization stood for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cap.errors import ConfigError
from lightning_cap.export.exporter import Exporter, Runner, torch_runner
from lightning_cap.export.onnx import ONNX
from lightning_cap.quantization.layers import base_config, fake_quantized
from lightning_cap.utilities.arguments import require_instance, require_path

_LOW, _HIGH = -128, 127


class IntegerExporter(Exporter):
    """Of a format that holds int8 weights of fake quantized Linear layers.

    Args:
        tolerance: Largest difference between an output of the file and of torch, as a share of torch's largest output. Where sums
            are added up in another order, an input on the edge between two integers is rounded to the other one, 1/255 of its
            range away.

    Raises:
        ConfigError: The tolerance is no number in (0, 1).
    """

    integers = True

    def __init__(self, tolerance: float = 0.05) -> None:
        super().__init__(tolerance)

    def prepare(self, model: nn.Module, inputs: Tensor) -> tuple[nn.Module, Tensor]:
        """The fake quantized model itself.

        Raises:
            ConfigError: No layer of it is.
        """
        if not fake_quantized(model):
            raise ConfigError(
                f"to={self.format!r}: no layer of the model was trained with int8 weights. Give a model, or the .ckpt of a run, "
                "with QATCallback."
            )
        return super().prepare(model, inputs)


class TorchAO(IntegerExporter):
    """``.torchao.pt``: the state dict of the model that torchao converts, with int8 weights and their scales.

    ``model.load_state_dict(torch.load(path, weights_only=True), assign=True)`` makes any model of that architecture compute with
    them, where torchao is installed and imported. Verified in torch.
    """

    format = "torchao"
    suffix = ".torchao.pt"
    packages = ("torchao",)
    extra = "quantization"

    def write(self, model: nn.Module, path: Path, inputs: Tensor, metadata: Mapping[str, str]) -> None:
        """Convert the model and save its state dict."""
        torch.save(_converted(model).state_dict(), path)

    def runner(self, path: Path | str, model: nn.Module | None = None, threads: int | None = None) -> Runner:
        """A copy of the model, of plain layers, with the weights of the file, run by torch."""
        require_instance("model", model, nn.Module, "the model that was exported")
        own = _converted(cast(nn.Module, model)).eval()
        own.load_state_dict(self._read(path), assign=True)
        return torch_runner(own)

    def stored(self, path: Path | str) -> dict[str, Tensor]:
        """The state dict, integers multiplied by their scales."""
        return {
            name: value.dequantize() if hasattr(value, "qdata") else value for name, value in self._read(path).items()
        }

    def _read(self, path: Path | str) -> dict[str, Tensor]:
        require_path("path", path, "model.torchao.pt")
        self.require_packages()
        import torchao.quantization  # noqa: F401  # the classes that the file holds

        held: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return held


class QDQ(IntegerExporter, ONNX):
    """``.qdq.onnx``: int8 weights with a scale per output row, and ``QuantizeLinear``/``DequantizeLinear`` around every product.

    Inputs are quantized as in training: with a scale and a zero point per token, found anew for each input. Verified in
    onnxruntime on the CPU.
    """

    format = "qdq"
    suffix = ".qdq.onnx"
    packages: ClassVar[tuple[str, ...]] = (*ONNX.packages, "torchao")
    extra = "onnx,quantization"

    def write(self, model: nn.Module, path: Path, inputs: Tensor, metadata: Mapping[str, str]) -> None:
        """Trace the model with its integers and translate the program."""
        names = list(fake_quantized(model))
        integers = _converted(model)
        for name in names:
            integers.set_submodule(name, _QDQLinear(cast(nn.Linear, integers.get_submodule(name))))
        super().write(integers, path, inputs, metadata)


class _QDQLinear(nn.Module):
    """A Linear layer of torchao's int8 weights, in operators of ONNX."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        held: Any = layer.weight
        self.register_buffer("weight", held.qdata.clone())
        self.register_buffer("scale", held.scale.flatten().clone())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """As `FakeQuantizedLinear` of torchao computes it."""
        rows = x.flatten(0, -2)
        low, high = rows.amin(1).clamp(max=0.0), rows.amax(1).clamp(min=0.0)
        scale = ((high - low) / (_HIGH - _LOW)).clamp(min=torch.finfo(torch.float32).smallest_normal)
        zero = (_LOW - torch.round(low / scale)).clamp(_LOW, _HIGH).to(torch.int8)
        integers = _onnx("QuantizeLinear", (rows, scale, zero), torch.int8, rows)
        rounded = _onnx("DequantizeLinear", (integers, scale, zero), torch.float32, rows)
        weight = _onnx("DequantizeLinear", (self.weight, self.scale), torch.float32, self.weight)
        return F.linear(rounded.view(x.shape), weight, self.bias)


def _onnx(operator: str, inputs: tuple[Any, ...], dtype: torch.dtype, like: Any) -> Tensor:
    """An operator of ONNX in a program that is traced; scales and zero points are of the first axis."""
    result: Tensor = torch.onnx.ops.symbolic(operator, inputs, {"axis": 0}, dtype=dtype, shape=like.shape)
    return result


def _converted(model: nn.Module) -> nn.Module:
    """A copy with torchao's integers in place of fake quantization."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    own = copy.deepcopy(model)
    quantize_(own, QATConfig(base_config(), step="convert"))
    return own.requires_grad_(False)
