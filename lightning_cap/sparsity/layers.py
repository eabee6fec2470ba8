"""Which layers of a model have weights that can be pruned, and which of those are left dense unless they are asked for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_cap.utilities.compiled import plain_name

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def prunable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Plain name of a Linear, Conv or attention weight -> its layer, in order of registration."""
    found: dict[str, nn.Module] = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        for attribute in _weights_of(layer):
            if isinstance(layer._parameters.get(attribute), nn.Parameter):
                found[_weight_name(path, attribute)] = layer
    return found


def computed_weights(model: nn.Module) -> dict[str, str]:
    """Plain name of each Linear, Conv or attention weight that is no parameter but is computed from some -> by what."""
    found: dict[str, str] = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        for attribute in _weights_of(layer):
            by = _computed_by(layer, attribute)
            if by:
                found[_weight_name(path, attribute)] = by
    return found


def _weights_of(layer: nn.Module) -> tuple[str, ...]:
    if isinstance(layer, (nn.Linear, *_CONV, *_CONV_TRANSPOSE)):
        return ("weight",)
    return _ATTENTION_WEIGHTS if isinstance(layer, nn.MultiheadAttention) else ()


def _weight_name(path: str, attribute: str) -> str:
    return plain_name(f"{path}.{attribute}" if path else attribute)


def _computed_by(layer: nn.Module, attribute: str) -> str:
    """``"weight_norm"`` and the like; empty if the weight is a parameter, or there is none."""
    if parametrize.is_parametrized(layer, attribute):
        steps = layer.parametrizations[attribute]  # type: ignore[index]
        return "parametrized by " + ", ".join(type(step).__name__.strip("_") for step in steps)
    own = {*layer._parameters, *layer._buffers}
    if attribute in own:
        return ""
    if f"{attribute}_mask" in own:
        return "torch.nn.utils.prune"
    if f"{attribute}_g" in own:
        return "weight_norm"
    if f"{attribute}_orig" in own:
        return "spectral_norm"
    return "computed" if isinstance(getattr(layer, attribute, None), Tensor) else ""


def is_depthwise(layer: nn.Module) -> bool:
    """Whether it is a convolution with one group per input channel."""
    return isinstance(layer, (*_CONV, *_CONV_TRANSPOSE)) and 1 < layer.groups == layer.in_channels


def registered_ends(model: nn.Module) -> tuple[list[str], list[str]]:
    """First and last weights by order of registration; of each timm model inside, those that its ``pretrained_cfg`` names."""
    prunable = list(prunable_layers(model))
    first: list[str] = []
    last: list[str] = []
    for path, module in model.named_modules():
        cfg = getattr(module, "pretrained_cfg", None)
        if not isinstance(cfg, Mapping):
            continue
        prefix = plain_name(path + ".") if path else ""
        inside = [name for name in prunable if name.startswith(prefix)]
        for found, key, fallback in ((first, "first_conv", inside[:1]), (last, "classifier", prunable[-1:])):
            value = cfg.get(key) or ()
            names = [f"{prefix}{v}.weight" for v in ((value,) if isinstance(value, str) else value)]
            found += [name for name in names if name in prunable] or fallback
    return (first, last) if first or last else (prunable[:1], prunable[-1:])
