"""A small vision transformer whose tokens are left out, and images for it."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from lightning_cap.tokens import DynamicViT, TokenPruning, ZeroTPrune

SIZES: dict[str, Any] = {
    "img_size": 20, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 4,
}  # fmt: skip
PATCHES = 25
BLOCKS = (1, 2, 3)
KEPT = (20, 16, 13)  # of 25, at 0.8 a stage
KINDS: list[type[TokenPruning]] = [DynamicViT, ZeroTPrune]


def vit(seed: int = 0, **changes: Any) -> VisionTransformer:
    """In evaluation, with attention that tells tokens apart as that of a trained one does."""
    torch.manual_seed(seed)
    model: Any = timm.create_model("vit_tiny_patch16_224", **{**SIZES, **changes})
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(12)
        model.cls_token.normal_()
        model.pos_embed.normal_()
        model.head.weight.mul_(10)
    return model.eval()  # type: ignore[no-any-return]


def pruned(kind: type[TokenPruning], seed: int = 0, **given: Any) -> Any:
    """Around such a one."""
    model = vit(seed, **given.pop("vit", {}))
    torch.manual_seed(seed + 1)
    made = kind(model, **{"blocks": BLOCKS, **given})
    for name, parameter in made.named_parameters():
        if name.startswith("predictors") and name.endswith("weight") and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)  # tells tokens apart, too
    return made.eval()


def images(number: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(number, 3, 20, 20, generator=torch.Generator().manual_seed(seed))


def batch(number: int = 6) -> tuple[Tensor, Tensor]:
    return images(number), torch.arange(number) % 4
