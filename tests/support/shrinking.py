"""Units made by hand, and models whose every entry matters, for the tests of what shrinks models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from lightning_cap.sparsity.units import Kind, Slice, UnitGroup, Units
from tests.support.unit_families import FAMILIES, Family

Part = tuple[str, int]  # a parameter and the dim of it that units divide


def _efficientnet_v2() -> nn.Module:
    blocks = [["cn_r1_k3_s1_e1_c8_skip"], ["er_r2_k3_s2_e4_c12"], ["ir_r2_k3_s2_e4_c16_se0.25"]]
    return EfficientNet(decode_arch_def(blocks), num_classes=5, num_features=24, stem_size=8, act_layer=nn.SiLU)


_RESNET: dict[str, Any] = {"channels": (8, 12, 16, 20)}
_CONVNEXT: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 20), "num_classes": 5}

#: Name -> (what makes a model, the shape of one example).
MODELS: dict[str, Family] = {
    **FAMILIES,
    "swin": (
        partial(timm.create_model, "swin_tiny_patch4_window7_224", num_classes=5, img_size=32, window_size=4, embed_dim=24,
                depths=(2, 2), num_heads=(2, 4)),
        (3, 32, 32),
    ),
    "convnext": (partial(timm.create_model, "convnext_atto", **_CONVNEXT), (3, 32, 32)),
    "convnextv2": (partial(timm.create_model, "convnextv2_atto", **_CONVNEXT), (3, 32, 32)),
    "xcit": (
        partial(timm.create_model, "xcit_nano_12_p16_224", num_classes=5, depth=2, embed_dim=32, num_heads=4, img_size=64),
        (3, 64, 64),
    ),
    "efficientnetv2": (_efficientnet_v2, (3, 32, 32)),
    "mobilenetv3": (partial(timm.create_model, "mobilenetv3_small_050", num_classes=5), (3, 32, 32)),
    "resnet": (partial(ResNet, BasicBlock, (1, 1, 1, 1), 5, **_RESNET), (3, 32, 32)),
    "resnet_d": (
        partial(ResNet, Bottleneck, (1, 1, 1, 1), 5, stem_width=8, stem_type="deep", avg_down=True, **_RESNET), (3, 32, 32)
    ),
}  # fmt: skip


def make_unsettled(name: str) -> tuple[nn.Module, Tensor]:
    """A model in evaluation mode of which no entry can be left out unnoticed, and inputs ``(2, ...)`` for it."""
    create, shape = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return unsettle(create()), torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))


def group(
    name: str, kind: Kind, size: int, producers: Sequence[Part], norms: Sequence[Part], consumers: Sequence[Part],
    shapes: Mapping[str, Sequence[int]], copies: Mapping[str, int] | None = None, buffers: Sequence[Part] = (),
) -> UnitGroup:  # fmt: skip
    """A group whose units divide each dim evenly; ``copies`` of a parameter lie one behind the other, as q, k and v do."""

    def part(name: str, dim: int) -> Slice:
        repeats = (copies or {}).get(name, 1)
        length = shapes[name][dim]
        index = torch.arange(length).view(repeats, size, -1).transpose(0, 1).reshape(size, -1)
        return Slice(name, dim, index)

    return UnitGroup(
        name, kind, size, *(tuple(part(*p) for p in parts) for parts in (producers, norms, consumers, buffers))
    )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all parameters and buffers."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def unsettle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and running statistic off its first value, so that none of them can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.2 if parameter.dim() < 2 else 0.02) * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.3 * torch.rand(buffer.shape, generator=generator)
    return model.eval()


def some_kept(units: Units, seed: int = 0, share: float = 0.5) -> dict[str, Tensor]:
    """Random units of each group, at least one; a single one in the first group."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for number, (name, members) in enumerate(units.items()):
        order = torch.randperm(members.size, generator=generator)
        left = 1 if number == 0 else max(1, int(members.size * share))
        kept[name] = torch.zeros(members.size, dtype=torch.bool)
        kept[name][order[:left]] = True
    return kept


@torch.no_grad()
def mask(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Zero what is masked, in place."""
    for name, parameter in model.named_parameters():
        if name in masks:
            parameter *= masks[name]
    return model
