"""What token pruning needs of a timm vision transformer, and the attention inside of its blocks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from lightning_cap.classifier.making import create_timm
from lightning_cap.classifier.weights import load_weights
from lightning_cap.errors import ConfigError, UnsupportedError
from lightning_cap.utilities.arguments import require_flag, require_instance, require_path, require_text

_EMBED = "_pos_embed"  # adds class and register tokens, and positions


@dataclass
class Attended:
    """What a block's attention computed.

    Attributes:
        weights: After the softmax, ``(b, heads, N, N)``; each row sums to 1.
        keys: ``(b, heads, N, d)``.
    """

    weights: Tensor | None = None
    keys: Tensor | None = None


def make_vit(
    model: object, pretrained: bool, checkpoint: str | None, model_kwargs: dict[str, Any] | None
) -> VisionTransformer:
    """The model itself, or timm's of this name.

    Raises:
        ConfigError: It cannot be made, or has no tokens with a class token among them.
    """
    require_instance("model", model, (str, nn.Module), "'deit_tiny_patch16_224'")
    require_flag("pretrained", pretrained)
    require_path("checkpoint", checkpoint, "weights.safetensors", optional=True)
    require_instance("model_kwargs", model_kwargs, dict, "{'num_classes': 10}", optional=True)
    if isinstance(model, str):
        require_text("model", model, "deit_tiny_patch16_224")
        if pretrained and checkpoint is not None:
            raise ConfigError(f"pretrained=True and checkpoint={str(checkpoint)!r} are both given; keep one of them.")
        model = create_timm(model, None, pretrained, model_kwargs or {}, 0.0)
    elif pretrained or model_kwargs is not None:
        raise ConfigError(
            f"pretrained={pretrained} and model_kwargs={model_kwargs!r} need a timm name, but model is a "
            f"{type(model).__name__} already. Give them to the model itself."
        )
    vit = require_tokens("model", model)
    if checkpoint is not None:
        load_weights(vit, checkpoint)
    return vit


def require_tokens(argument: str, model: object) -> VisionTransformer:
    """Refuse what is no timm vision transformer with a class token.

    Raises:
        ConfigError: Says what is missing.
        UnsupportedError: This timm has another name for something.
    """
    if not isinstance(model, VisionTransformer):
        raise ConfigError(
            f"{argument}={type(model).__name__}: it has no tokens that can be left out. Give a timm VisionTransformer, such as "
            "'vit_tiny_patch16_224' or 'deit_small_patch16_224'."
        )
    if model.cls_token is None:
        raise ConfigError(
            f"{argument}={type(model).__name__}: it has no class token, which is what is kept whatever goes. Give one with "
            "class_token=True."
        )
    if not hasattr(model, _EMBED):
        raise UnsupportedError(
            f"timm {timm.__version__} has no VisionTransformer.{_EMBED}, which token pruning needs. pip install 'timm<=1.0.31'"
        )
    return model


def embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """What the first block gets: ``(b, N, C)`` of images ``(b, C, H, W)``."""
    patches = vit.patch_embed(images)
    tokens: Tensor = vit.norm_pre(vit.patch_drop(getattr(vit, _EMBED)(patches)))
    return tokens


def require_attention(number: int, block: nn.Module) -> None:
    """Refuse a block whose attention weights cannot be seen.

    Raises:
        ConfigError: Names the block.
    """
    attention = getattr(block, "attn", None)
    if not isinstance(attention, Attention):
        raise ConfigError(
            f"model: its block {number - 1} ({type(block).__name__}) has no softmax attention that can be read ("
            f"{type(attention).__name__}). Give a model with timm's Attention, or leave {number} out of blocks=."
        )


def require_mask(number: int, block: nn.Module, why: str, way_out: str = "") -> None:
    """Refuse a block that takes nothing to add to its attention scores.

    Args:
        number: Of the block.
        block: Of timm.
        why: What cannot be done then.
        way_out: Another one than the usual.

    Raises:
        ConfigError: Names the block.
    """
    if "attn_mask" not in inspect.signature(block.forward).parameters:
        raise ConfigError(
            f"model: its block {number} ({type(block).__name__}) takes no attn_mask, so that {why}. Update timm, give a model of "
            f"its usual blocks{way_out}."
        )


@contextmanager
def attention_of(block: nn.Module) -> Iterator[Attended]:
    """What the attention of a block computes inside. It is not fused meanwhile, as a fused one keeps its weights to itself."""
    attention: Any = block.attn
    seen = Attended()

    def see_keys(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.keys = output.detach()

    def see_weights(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.weights = inputs[0].detach()

    handles = [
        attention.k_norm.register_forward_hook(see_keys),
        attention.attn_drop.register_forward_pre_hook(see_weights),
    ]
    fused, attention.fused_attn = attention.fused_attn, False
    try:
        yield seen
    finally:
        attention.fused_attn = fused
        for handle in handles:
            handle.remove()
