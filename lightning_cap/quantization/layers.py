"""Linear layers with int8 weights and inputs by torchao: which can be, and what makes them so and plain again."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from lightning_cap.errors import ConfigError, TargetError
from lightning_cap.sparsity.layers import computed_weights, prunable_layers
from lightning_cap.sparsity.targets import matches
from lightning_cap.utilities import rng
from lightning_cap.utilities.compiled import plain_name
from lightning_cap.utilities.packages import require_package

#: Modules whose fast paths read the weights of their Linear layers past the layers' own forward.
_READ_PAST = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def base_config() -> Any:
    """torchao's configuration: weights of int8, symmetric with a scale per output row; inputs of int8, with a scale and a zero
    point per token, found anew for each input.
    """
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerAxis

    return Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))


def choose_layers(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> tuple[list[str], dict[str, str]]:
    """The layers to quantize, and those that torchao cannot take.

    Args:
        model: Any module.
        include: Globs or names over weights, as of `Targets.from_model`. Default: every Linear layer.
        exclude: Globs or names to leave in float.

    Returns:
        Names of layers, and ``{weight: why}`` of those that are chosen but cannot be.

    Raises:
        TargetError: A pattern matches nothing, or nothing is left.
    """
    parameters = {plain_name(name): value for name, value in model.named_parameters(remove_duplicate=False)}
    layers, computed = prunable_layers(model), computed_weights(model)
    chosen = {*layers, *computed} if include is None else matches("include", include, parameters, layers, computed)
    chosen -= matches("exclude", exclude or (), parameters, parameters, computed)
    reasons = {name: reason for name, reason in _reasons(model).items() if name in chosen}
    reasons |= {name: f"a weight {how}" for name, how in computed.items() if name in chosen}
    reasons |= dict.fromkeys(sorted(chosen - {*layers, *computed}), "no weight of a Linear layer")
    names = [name.rpartition(".")[0] for name in layers if name in chosen and name not in reasons]
    if not names:
        left = "; ".join(f"{name}: {why}" for name, why in list(reasons.items())[:4]) or "none is chosen"
        raise TargetError(
            f"include/exclude: the model has no Linear layer left to quantize ({left}). Name weights of Linear layers with "
            "include=['*.weight']."
        )
    return names, reasons


def prepare(model: nn.Module, names: Collection[str]) -> None:
    """Swap Linear layers for torchao's with fake quantization, in place; their Parameter objects stay.

    No random number is drawn. Layers that are swapped already stay as they are.

    Args:
        model: Of which the layers are.
        names: Of the layers, as `choose_layers` gives them.

    Raises:
        ConfigError: torchao is missing, or the model has no such Linear layer.
    """
    layers = {plain_name(name): layer for name, layer in model.named_modules(remove_duplicate=False)}
    for name in names:
        if not isinstance(layers.get(name), nn.Linear):
            raise ConfigError(f"layers: the model has no Linear layer {name!r}. Give the model that was quantized.")
    require_package("torchao", "Quantization", "quantization")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    wanted = set(names) - set(fake_quantized(model))
    modes = {name: layers[name].training for name in wanted}
    with rng.preserved():  # torchao initialises a layer before it gets the old one's parameters
        quantize_(model, QATConfig(base_config(), step="prepare"), lambda _, name: plain_name(name) in wanted)
    found = {plain_name(name): layer for name, layer in model.named_modules(remove_duplicate=False)}
    swapped = {id(layers[name]): found[name] for name in wanted if found[name] is not layers[name]}
    _put(model, swapped)  # torchao finds a layer of two names by one of them
    for name, layer in fake_quantized(model).items():
        layer.train(modes.get(name, layer.training))


def make_plain(model: nn.Module, keep: Collection[str] = ()) -> None:
    """Swap layers that `prepare` has made back for Linear layers, in place; their Parameter objects stay.

    Args:
        model: Of which the layers are.
        keep: Names of those to leave.
    """
    plain: dict[int, nn.Module] = {}
    for name, layer in fake_quantized(model).items():
        if name not in keep and id(layer) not in plain:
            with rng.preserved():  # as it is initialised before it gets the parameters
                plain[id(layer)] = cast(Any, layer).to_linear().train(layer.training)
    _put(model, plain)


def _put(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """In the place of modules of these ids, under all their names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # with those that have two names
            if id(child) in new:
                setattr(parent, name, new[id(child)])


def fake_quantized(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that `prepare` has made, by plain name."""
    kind = _fake_quantized_linear()
    if kind is None:
        return {}
    found = model.named_modules(remove_duplicate=False)
    return {plain_name(name): layer for name, layer in found if isinstance(layer, kind)}


@contextmanager
def plain_linears(model: nn.Module) -> Iterator[None]:
    """Inside, fake quantized layers are ordinary Linear layers.

    Their fake quantization gives the largest weight of most rows no gradient, as it is rounded to beyond the range and clipped:
    to a Fisher it would look useless. It does not go through ``vmap`` either.
    """
    layers = {id(layer): layer for layer in fake_quantized(model).values()}
    kinds = {key: type(layer) for key, layer in layers.items()}
    for layer in layers.values():
        layer.__class__ = nn.Linear
    try:
        yield
    finally:
        for key, layer in layers.items():
            layer.__class__ = kinds[key]


def _fake_quantized_linear() -> type[nn.Linear] | None:
    """torchao's class; None where torchao was not imported, so that no layer can be of it."""
    if "torchao.quantization.qat" not in sys.modules:
        return None
    from torchao.quantization.qat import FakeQuantizedLinear

    kind: type[nn.Linear] = FakeQuantizedLinear
    return kind


def _reasons(model: nn.Module) -> dict[str, str]:
    """Weight -> why torchao cannot take its layer."""
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    forwards = {nn.Linear.forward, getattr(_fake_quantized_linear(), "forward", None)}
    found: dict[str, str] = {}
    for weight, layer in prunable_layers(model).items():
        name = weight.rpartition(".")[0]
        parent = modules.get(name.rpartition(".")[0], model)
        kind = type(layer).__name__
        if not isinstance(layer, nn.Linear):
            found[weight] = f"a {kind}"
        elif isinstance(parent, _READ_PAST):
            found[weight] = f"read past its layer by {type(parent).__name__}"
        elif not name:
            found[weight] = "the model itself"
        elif type(layer).forward not in forwards:
            found[weight] = f"a {kind} with a forward of its own"
        elif nn.parameter.is_lazy(layer.weight) or layer.in_features < 2:
            found[weight] = "it has no two inputs"
        elif layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
            found[weight] = "it has hooks, which the swap would lose"
    return found
