from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lightning_cap.errors import ConfigError, UnsupportedError
from lightning_cap.sparsity.partial_norms import PartialLayerNorm
from lightning_cap.sparsity.shrinking import shrink_in_place
from lightning_cap.sparsity.units import UnitGroup, Units
from tests.support.shrinking import group, mask, shapes_of, some_kept, unsettle

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def shrunk(model: nn.Module, units: Units, kept: Mapping[str, Tensor], x: Tensor = IMAGES) -> nn.Module:
    """A smaller copy, whose outputs are found equal to those of the model with these units masked."""
    small = copy.deepcopy(model)
    shrink_in_place(small, units, kept)
    every = {name: torch.ones(members.size, dtype=torch.bool) for name, members in units.items()} | dict(kept)
    masked = mask(copy.deepcopy(model), units.masks(units.targets(model).shapes, every))
    with torch.no_grad():
        full, want, got = model(x), masked(x), small(x)
    assert (want - full).abs().max() > 1e-3 * full.abs().max(), "the masks change nothing"
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(small))(x), got)
        assert torch.equal(copy.deepcopy(small)(x), got)
    count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert count > 0
    return small


def vit_units(model: nn.Module, blocks: int = 2, heads: int = 2, stream: bool = True) -> Units:
    """All heads, neurons and channels of the stream of a small ViT."""
    shapes = shapes_of(model)
    groups: list[UnitGroup] = []
    for b in (f"blocks.{i}" for i in range(blocks)):
        qkv = [(f"{b}.attn.qkv.weight", 0), (f"{b}.attn.qkv.bias", 0)]
        groups.append(
            group(
                f"{b}.attn",
                "head",
                heads,
                qkv,
                [],
                [(f"{b}.attn.proj.weight", 1)],
                shapes,
                {name: 3 for name, _ in qkv},
            )
        )
        fc1 = [(f"{b}.mlp.fc1.weight", 0), (f"{b}.mlp.fc1.bias", 0)]
        groups.append(group(f"{b}.mlp", "neuron", shapes[fc1[0][0]][0], fc1, [], [(f"{b}.mlp.fc2.weight", 1)], shapes))
    if stream:
        into = ["patch_embed.proj", *(f"blocks.{i}.{x}" for i in range(blocks) for x in ("attn.proj", "mlp.fc2"))]
        norms = [*(f"blocks.{i}.norm{n}" for i in range(blocks) for n in (1, 2)), "norm"]
        out = [*(f"blocks.{i}.{x}" for i in range(blocks) for x in ("attn.qkv", "mlp.fc1")), "head"]
        producers = [("cls_token", 2), ("pos_embed", 2)]
        producers += [(f"{x}.{p}", 0) for x in into for p in ("weight", "bias")]
        groups.append(
            group("stream", "channel", 16, producers, [(f"{x}.{p}", 0) for x in norms for p in ("weight", "bias")],
                  [(f"{x}.weight", 1) for x in out], shapes)
        )  # fmt: skip
    return Units(groups)


def cnn_units(model: nn.Module) -> Units:
    """Channels between the layers of a small convnet, depthwise in the middle."""
    shapes = shapes_of(model)
    first = [("0.weight", 0), ("3.weight", 0), ("3.bias", 0)]
    norm = [(f"{layer}.{p}", 0) for layer in (1, 4) for p in ("weight", "bias")]
    statistics = [(f"{layer}.{p}", 0) for layer in (1, 4) for p in ("running_mean", "running_var")]
    last = [("6.weight", 0), ("6.bias", 0)]
    return Units(
        [
            group("0", "channel", 8, first, norm, [("6.weight", 1)], shapes, buffers=statistics),
            group("6", "channel", 12, last, [], [("9.weight", 1)], shapes),
        ]
    )


@pytest.fixture
def cnn() -> nn.Module:
    torch.manual_seed(0)
    return unsettle(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
            nn.ReLU(), nn.Conv2d(8, 12, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5),
        )
    )  # fmt: skip


def test_a_smaller_vit_gives_what_the_masked_one_gives(tiny_vit: nn.Module) -> None:
    model = unsettle(tiny_vit)
    units = vit_units(model)
    kept = some_kept(units)
    small = shrunk(model, units, kept)
    assert small.blocks[0].attn.num_heads == 1  # type: ignore[index, union-attr]
    assert small.blocks[0].mlp.fc1.out_features == 32  # type: ignore[index, union-attr]
    assert isinstance(small.norm, PartialLayerNorm)
    assert (small.norm.total, small.norm.normalized_shape) == (16, (8,))
    small.reset_classifier(3)  # type: ignore[operator]
    assert small(IMAGES).shape == (3, 3)


def test_a_vit_without_a_pruned_stream_keeps_its_own_norms(tiny_vit: nn.Module) -> None:
    units = vit_units(unsettle(tiny_vit), stream=False)
    small = shrunk(tiny_vit, units, some_kept(units))
    assert not any(isinstance(module, PartialLayerNorm) for module in small.modules())


def test_a_smaller_model_can_be_shrunk_again(tiny_vit: nn.Module) -> None:
    units = vit_units(unsettle(tiny_vit))
    kept = {"stream": torch.arange(16) < 12}
    small = shrunk(tiny_vit, units, kept)
    again = units_of_what_is_left(units, small, 12)
    smaller = shrunk(small, again, {"stream": torch.arange(12) % 2 == 0, "blocks.0.mlp": torch.arange(64) > 9})
    assert (smaller.norm.total, smaller.norm.normalized_shape) == (16, (6,))  # type: ignore[union-attr]


def units_of_what_is_left(units: Units, small: nn.Module, channels: int) -> Units:
    shapes = shapes_of(small)
    stream = units["stream"]
    roles = [[(s.name, s.dim) for s in getattr(stream, role)] for role in ("producers", "norms", "consumers")]
    return Units(
        [*(g for g in units.values() if g is not stream), group("stream", "channel", channels, *roles, shapes)]
    )


def test_a_smaller_convnet_gives_what_the_masked_one_gives(cnn: nn.Module) -> None:
    units = cnn_units(cnn)
    small = shrunk(cnn, units, {"0": torch.arange(8) % 3 == 0, "6": torch.arange(12) > 6})
    conv = small[3]  # type: ignore[index]
    assert (conv.in_channels, conv.out_channels, conv.groups) == (3, 3, 3)
    assert small[4].num_features == 3  # type: ignore[index]
    assert small[9].in_features == 20  # type: ignore[index]


def test_zeros_inside_kept_units_stay_and_frozen_parameters_stay_frozen(cnn: nn.Module) -> None:
    with torch.no_grad():
        cnn[6].weight *= torch.rand(cnn[6].weight.shape) < 0.5  # type: ignore[index, operator]
    cnn[9].bias.requires_grad_(False)  # type: ignore[index, union-attr, operator]
    cnn[9].weight.requires_grad_(False)  # type: ignore[index, union-attr, operator]
    units = cnn_units(cnn)
    kept = {"0": torch.arange(8) < 4, "6": torch.arange(12) < 6}
    small = shrunk(cnn, units, kept)
    assert torch.equal(small[6].weight, cnn[6].weight[:6, :4])  # type: ignore[index]
    assert not small[9].weight.requires_grad  # type: ignore[index]
    assert small[6].weight.requires_grad  # type: ignore[index]


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 2))
    model[2].weight = model[1].weight
    parts = [("0.weight", 0), ("0.bias", 0), ("1.weight", 0)]
    units = Units([group("0", "neuron", 6, parts, [], [("1.weight", 1), ("3.weight", 1)], shapes_of(model))])
    small = shrunk(model, units, {"0": torch.arange(6) < 4}, torch.randn(3, 4))
    assert small[1].weight is small[2].weight  # type: ignore[index]
    assert small[2].in_features == 4  # type: ignore[index]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("old", [True, False])
def test_attention_of_any_timm_takes_fewer_heads(
    tiny_vit: nn.Module, fused: bool, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before timm 1.0.20 or so, the heads had to be as wide as the input together."""
    model = unsettle(tiny_vit)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = fused  # type: ignore[union-attr]
        if old and hasattr(block.attn, "attn_dim"):
            del block.attn.attn_dim  # type: ignore[union-attr]
            monkeypatch.setattr(type(block.attn), "forward", forward_of_before)
    units = vit_units(model)
    shrunk(model, units, some_kept(units))
    shrunk(model, units, {"stream": torch.arange(16) < 5})


def forward_of_before(self: nn.Module, x: Tensor, **_: Any) -> Tensor:
    B, N, C = x.shape
    q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[operator]
    out = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
    return self.proj(out.transpose(1, 2).reshape(B, N, C))  # type: ignore[operator, no-any-return]


def test_units_of_another_model_are_refused(tiny_vit: nn.Module, cnn: nn.Module) -> None:
    units = vit_units(tiny_vit)
    with pytest.raises(ConfigError, match=r"'blocks.0.attn' have entries of .*, which the model does not have"):
        shrink_in_place(cnn, units, {})
    small = copy.deepcopy(tiny_vit)
    shrink_in_place(small, units, {"stream": torch.arange(16) < 8})
    with pytest.raises(
        ConfigError, match=r"'stream' have entries of 'cls_token', which the model has in shape \(1, 1, 8\)"
    ):
        shrink_in_place(small, units, {})


def test_groups_must_stay_even() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 2, 1))
    parts = [("0.weight", 0), ("0.bias", 0), ("2.weight", 0), ("2.bias", 0)]
    norms = [("1.weight", 0), ("1.bias", 0)]
    units = Units([group("0", "channel", 4, parts, norms, [("3.weight", 1)], shapes_of(model))])
    small = shrunk(unsettle(model), units, {"0": torch.tensor([True, False, False, True])})
    assert (small[1].num_groups, small[1].num_channels, small[2].groups) == (2, 4, 2)  # type: ignore[index]
    single = Units([group("0", "channel", 8, parts, norms, [("3.weight", 1)], shapes_of(model))])
    with pytest.raises(UnsupportedError, match="1: a GroupNorm of which a group loses some channels"):
        shrink_in_place(copy.deepcopy(model), single, {"0": torch.arange(8) < 5})
    model[1] = nn.Identity()
    rest = Units([group("0", "channel", 8, parts, [], [("3.weight", 1)], shapes_of(model))])
    with pytest.raises(UnsupportedError, match=r"2: its groups would have \[1, 2\] channels"):
        shrink_in_place(copy.deepcopy(model), rest, {"0": torch.arange(8) < 5})


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_norms_over_channels_count_those_that_are_gone(name: str) -> None:
    """LayerNorm over (N, C, H, W) and global response normalization."""
    torch.manual_seed(0)
    model = unsettle(timm.create_model(name, depths=(1, 1, 1, 1), dims=(8, 12, 8, 8), num_classes=5))
    shapes = shapes_of(model)
    b = "stages.0.blocks.0"
    neurons = [(f"{b}.mlp.fc1.weight", 0), (f"{b}.mlp.fc1.bias", 0)]
    grn = [(f"{b}.mlp.grn.{p}", 0) for p in ("weight", "bias")] if name == "convnextv2_atto" else []
    producers = [(f"{x}.{p}", 0) for x in ("stem.0", f"{b}.conv_dw", f"{b}.mlp.fc2") for p in ("weight", "bias")]
    producers += [(f"{b}.gamma", 0)] if f"{b}.gamma" in shapes else []
    norms = [(f"{x}.{p}", 0) for x in ("stem.1", f"{b}.norm", "stages.1.downsample.0") for p in ("weight", "bias")]
    units = Units(
        [
            group("mlp", "neuron", 32, neurons, grn, [(f"{b}.mlp.fc2.weight", 1)], shapes),
            group(
                "stem",
                "channel",
                8,
                producers,
                norms,
                [(f"{b}.mlp.fc1.weight", 1), ("stages.1.downsample.1.weight", 1)],
                shapes,
            ),
        ]
    )
    x = torch.randn(2, 3, 32, 32)
    shrunk(model, units, {"mlp": torch.arange(32) % 3 == 0, "stem": torch.arange(8) > 2}, x)
    shrunk(model, units, {"mlp": torch.arange(32) == 7, "stem": torch.arange(8) == 3}, x)


def test_rms_norms_count_those_that_are_gone() -> None:
    torch.manual_seed(0)
    model = unsettle(nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8, eps=0.1), nn.Linear(8, 3)))
    parts = [("0.weight", 0), ("0.bias", 0)]
    units = Units([group("0", "neuron", 8, parts, [("1.weight", 0)], [("2.weight", 1)], shapes_of(model))])
    shrunk(model, units, {"0": torch.arange(8) < 3}, torch.randn(5, 4))


def test_a_layer_norm_of_an_unknown_kind_is_refused() -> None:
    class Squared(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).square()

    model = nn.Sequential(nn.Linear(4, 8), Squared(8), nn.Linear(8, 3))
    parts = [("0.weight", 0), ("0.bias", 0)]
    norms = [("1.weight", 0), ("1.bias", 0)]
    units = Units([group("0", "neuron", 8, parts, norms, [("2.weight", 1)], shapes_of(model))])
    with pytest.raises(UnsupportedError, match="1: a Squared cannot be shrunk"):
        shrink_in_place(model, units, {"0": torch.arange(8) < 3})
