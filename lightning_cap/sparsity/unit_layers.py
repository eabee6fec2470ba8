"""The layers whose ends can be cut: how many channels they have, and which entries of their parameters belong to each."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_cap.sparsity.layers import is_depthwise

_CONV = nn.modules.conv._ConvNd
_TRANSPOSED = nn.modules.conv._ConvTransposeNd
_BATCH_NORM = nn.modules.batchnorm._NormBase  # of instances too
_OVER_CHANNELS = (nn.LayerNorm, nn.GroupNorm)


def width_of(owner: Any, way: str) -> int | None:
    """Channels at an end ("in", "out", "both") of a layer; None for what is none."""
    if isinstance(owner, nn.Linear):
        return owner.in_features if way == "in" else owner.out_features
    if isinstance(owner, _CONV):
        return owner.in_channels if way == "in" else owner.out_channels
    return _width_of_norm(owner)


def _width_of_norm(owner: Any) -> int | None:
    if isinstance(owner, _BATCH_NORM):
        return owner.num_features
    if isinstance(owner, nn.LayerNorm):
        return int(owner.normalized_shape[-1])
    if isinstance(owner, nn.GroupNorm):
        return owner.num_channels
    if isinstance(owner, nn.PReLU):
        return owner.num_parameters
    if isinstance(owner, nn.Embedding):
        return owner.embedding_dim
    return owner.embed_dim if isinstance(owner, nn.MultiheadAttention) else None


def role_of(owner: nn.Module, way: str) -> str:
    """What an end of a layer is to a channel: "producers", "norms" or "consumers"."""
    if way == "in":
        return "consumers"
    return "norms" if is_norm(owner) else "producers"


def is_norm(owner: Any) -> bool:
    """Whether it scales and shifts channels by statistics."""
    return isinstance(owner, (_BATCH_NORM, *_OVER_CHANNELS))


def makes_channels(owner: Any) -> bool:
    """Whether a layer's output channels are its own; those of a depthwise convolution or a norm are what enters it."""
    return isinstance(owner, (nn.Linear, nn.Embedding)) or (isinstance(owner, _CONV) and not is_depthwise(owner))


def entries_of(owner: nn.Module, way: str) -> tuple[dict[str, int], list[str]]:
    """Attributes of a layer that have entries of a channel: ``{parameter: dim}``, and its buffers (dim 0)."""
    if isinstance(owner, nn.Embedding):
        return {"weight": 1}, []
    dims = {"weight": int((way == "in") != isinstance(owner, _TRANSPOSED))}
    if isinstance(owner, _TRANSPOSED) and is_depthwise(owner):
        dims = {"weight": 0}
    if way != "in" and getattr(owner, "bias", None) is not None:
        dims["bias"] = 0
    if getattr(owner, "weight", None) is None:
        dims = {}
    statistics = ("running_mean", "running_var") if isinstance(owner, _BATCH_NORM) else ()
    return dims, [name for name in statistics if getattr(owner, name) is not None]


def why_fixed(owner: Any) -> str:
    """Why a layer's ends cannot be cut; empty if they can."""
    if isinstance(owner, nn.MultiheadAttention):
        return "part of nn.MultiheadAttention"
    if (
        isinstance(owner, _CONV)
        and owner.groups > 1
        and not (is_depthwise(owner) and owner.in_channels == owner.out_channels)
    ):
        return "a grouped convolution"
    if isinstance(owner, nn.GroupNorm) and owner.num_groups != owner.num_channels:
        return "normalized in groups"
    if isinstance(owner, nn.Module) and "weight" not in owner._parameters:
        return "its weight is computed"
    return ""


def is_normalized_over_channels(owner: Any) -> bool:
    """Whether each output of a layer depends on all its channels, though it keeps them apart."""
    return isinstance(owner, nn.LayerNorm)
