"""The exporters of models that `QATCallback` has trained: the integers that fake quantization stood for."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_cap.errors import ConfigError, ExportError
from lightning_cap.export.batches import Inputs, call, num_rows, output_tensors
from lightning_cap.export.exporter import Exporter, Runner, torch_runner
from lightning_cap.export.onnx import ONNX
from lightning_cap.export.verification import largest_difference
from lightning_cap.quantization.layers import base_config, fake_quantized, plain_linears
from lightning_cap.utilities.arguments import require_flag, require_instance, require_path

_LOW, _HIGH = -128, 127
_OTHERWISE_ROUNDED, _MOST = 1.5, 0.5  # see the tolerance; two roundings that have nothing in common differ by 1.41
_TINY = torch.finfo(torch.float32).smallest_normal


class IntegerExporter(Exporter):
    """Of a format that holds int8 weights of fake quantized Linear layers.

    Args:
        tolerance: Largest difference between an output of the file and of torch, as a share of torch's largest output.

    Raises:
        ConfigError: The tolerance is no number in (0, 1).
    """

    integers = True

    def __init__(self, tolerance: float = 0.05) -> None:
        super().__init__(tolerance)

    def prepare(self, model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
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

    def check_stored(self, model: nn.Module, stored: Mapping[str, Tensor]) -> None:
        """Integers, multiplied by their scales, are the weights that fake quantization gives; so zeros are zero.

        Raises:
            ExportError: A weight is another one.
        """
        for name, layer in fake_quantized(model).items():
            rounding: Any = layer.weight_fake_quantizer
            rounded = rounding(layer.weight).detach()
            held = stored.get(f"{name}.weight", rounded.new_empty(0))
            if held.shape != rounded.shape or not torch.allclose(held, rounded, rtol=1e-5, atol=0.0):
                raise ExportError(
                    f"to={self.format!r}: the integers of {name!r} in the file are not those it was trained with. The file was "
                    "removed."
                )


class TorchAO(IntegerExporter):
    """``.torchao.pt``: the state dict of the model that torchao converts, with int8 weights and their scales.

    ``model.load_state_dict(torch.load(path, weights_only=True), assign=True)`` makes any model of that architecture compute with
    them, where torchao is installed and imported. Verified in torch.
    """

    format = "torchao"
    suffix = ".torchao.pt"
    packages = ("torchao",)
    extra = "quantization"

    def write(self, model: nn.Module, path: Path, inputs: Inputs, metadata: Mapping[str, str]) -> None:
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

    Inputs of the layers are quantized as in training: with a scale and a zero point per token, found anew for each input. ONNX
    Runtime computes such products in float. With ``static`` a layer has one scale and zero point for all its inputs, so that it
    computes them in integers: faster, and further from what was trained; a message says how far. Verified in onnxruntime on the
    CPU, against torch with the same scales.

    Args:
        tolerance: Largest difference between an output of the file and of torch, as a share of torch's largest output, unless int8
            itself moves the outputs by more: then one and a half times as much as that, and half of the largest output at the most.
            The two add sums up in another order, so an input on the edge between two integers is rounded to the other one, and many
            layers on this makes as much of a difference as rounding does.
        static: Constant scales: of the range that the inputs of each layer have on the example input, which is to be real.

    Raises:
        ConfigError: The tolerance is no number in (0, 1), or ``static`` is neither True nor False.
    """

    format = "qdq"
    suffix = ".qdq.onnx"
    packages: ClassVar[tuple[str, ...]] = (*ONNX.packages, "torchao")
    extra = "onnx,quantization"

    def __init__(self, tolerance: float = 0.05, static: bool = False) -> None:
        super().__init__(tolerance)
        require_flag("static", static)
        self.static = static

    def prepare(self, model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
        """The fake quantized model, with constant scales where they are to be."""
        model, inputs = super().prepare(model, inputs)
        return (_with_constant_scales(model, inputs) if self.static else model), inputs

    def allowed(self, model: nn.Module, inputs: Inputs, expected: Sequence[Tensor]) -> float:
        """See the tolerance."""
        with plain_linears(model):
            plain = output_tensors(call(model, inputs))
        moved = max(largest_difference(*pair) for pair in zip(plain, expected, strict=True))
        return max(self.tolerance, min(_OTHERWISE_ROUNDED * moved, _MOST))

    def stored(self, path: Path | str) -> dict[str, Tensor]:
        """The initializers, integers multiplied by their scales, in the shape ``(out, in)`` of weights."""
        held = super().stored(path)
        for name in [name for name, value in held.items() if name.endswith(".weight") and value.dtype == torch.int8]:
            layer = name.removesuffix(".weight")
            integers = held[name].t() if f"{layer}.input_scale" in held else held[name]
            held[name] = integers.float() * held[f"{layer}.scale"].unsqueeze(1)
        return held

    def write(self, model: nn.Module, path: Path, inputs: Inputs, metadata: Mapping[str, str]) -> None:
        """Trace the model with its integers and translate the program."""
        rounding = {name: layer.activation_fake_quantizer for name, layer in fake_quantized(model).items()}
        integers = _converted(model)
        for name, scales in rounding.items():
            layer = cast(nn.Linear, integers.get_submodule(name))
            new = _StaticLinear(layer, scales) if isinstance(scales, _ConstantScale) else _QDQLinear(layer)
            integers.set_submodule(name, new)
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
        scale = ((high - low) / (_HIGH - _LOW)).clamp(min=_TINY)
        zero = (_LOW - torch.round(low / scale)).clamp(_LOW, _HIGH).to(torch.int8)
        integers = _onnx("QuantizeLinear", (rows, scale, zero), torch.int8, rows, axis=0)
        rounded = _onnx("DequantizeLinear", (integers, scale, zero), torch.float32, rows, axis=0)
        weight = _onnx("DequantizeLinear", (self.weight, self.scale), torch.float32, self.weight, axis=0)
        return F.linear(rounded.view(x.shape), weight, self.bias)


class _StaticLinear(nn.Module):
    """The same with constant scales, in the form that ONNX Runtime has an integer product for: uint8 by int8, ``(in, out)``."""

    def __init__(self, layer: nn.Linear, scales: _ConstantScale) -> None:
        super().__init__()
        held: Any = layer.weight
        self.register_buffer("weight", held.qdata.t().contiguous())
        self.register_buffer("scale", held.scale.flatten().clone())
        self.register_buffer("input_scale", scales.scale.clone())
        self.register_buffer("input_zero", scales.zero.to(torch.uint8))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """As the layer with `_ConstantScale`."""
        integers = _onnx("QuantizeLinear", (x, self.input_scale, self.input_zero), torch.uint8, x)
        rounded = _onnx("DequantizeLinear", (integers, self.input_scale, self.input_zero), torch.float32, x)
        weight = _onnx("DequantizeLinear", (self.weight, self.scale), torch.float32, self.weight, axis=1)
        # ONNX Runtime makes a Gemm of two dimensions, has none in integers, and rounds its bias
        product = rounded @ weight if x.dim() > 2 else (rounded.unsqueeze(0) @ weight).squeeze(0)
        return product if self.bias is None else product + self.bias


class _ConstantScale(nn.Module):
    """Rounds all inputs of a layer to the same 256 values, 0 among them, in place of torchao's rounding per token."""

    scale: Tensor
    zero: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
        self.register_buffer("scale", ((high - low) / 255).clamp(min=_TINY))
        self.register_buffer("zero", torch.round(-low / self.scale).clamp(0, 255))

    def forward(self, x: Tensor) -> Tensor:
        """Values on the grid."""
        return ((torch.round(x / self.scale) + self.zero).clamp(0, 255) - self.zero) * self.scale


def _with_constant_scales(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy whose layers round their inputs by the range that these have here."""
    own = copy.deepcopy(model)
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def look(name: str, given: Tensor) -> None:
        low, high = given.detach().aminmax()
        before = ranges.get(name, (low, high))
        ranges[name] = torch.minimum(low, before[0]), torch.maximum(high, before[1])

    layers: dict[str, Any] = dict(fake_quantized(own))
    handles = [
        layer.activation_fake_quantizer.register_forward_pre_hook(lambda _, given, name=name: look(name, given[0]))
        for name, layer in layers.items()
    ]
    trained = output_tensors(call(own, inputs))
    for handle in handles:
        handle.remove()
    for name, (low, high) in ranges.items():
        layers[name].activation_fake_quantizer = _ConstantScale(low, high)
    pairs = zip(output_tensors(call(own, inputs)), trained, strict=True)
    apart = max(float((new - old).abs().max() / old.abs().max().clamp(min=_TINY)) for new, old in pairs)
    rank_zero_info(
        f"Constant scales from {num_rows(inputs)} inputs move the outputs by {apart:.1%} of the largest one at the most."
    )
    return own


def _onnx(operator: str, inputs: tuple[Any, ...], dtype: torch.dtype, like: Any, **attributes: Any) -> Tensor:
    """An operator of ONNX in a program that is traced; ``axis`` is that of scales and zero points."""
    result: Tensor = torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=like.shape)
    return result


def _converted(model: nn.Module) -> nn.Module:
    """A copy with torchao's integers in place of fake quantization."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    own = copy.deepcopy(model)
    quantize_(own, QATConfig(base_config(), step="convert"))
    return own.requires_grad_(False)
