from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from lightning_cap.errors import ConfigError
from lightning_cap.sparsity import ModelFlops, Targets, model_flops, zero_shares

TOKENS, WIDTH, HIDDEN, DEPTH, CLASSES, PATCH = 17, 24, 48, 2, 5, 4


def vit(fused: bool) -> nn.Module:
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=3, mlp_ratio=2,
        num_classes=CLASSES, qkv_bias=True,
    )  # fmt: skip
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = fused
    return model


def count(model: nn.Module, x: Tensor) -> ModelFlops:
    return model_flops(model, lambda: model(x), len(x))


def used(flops: ModelFlops) -> dict[str, int]:
    return {name: n for name, n in flops.layers.items() if n}


@pytest.mark.parametrize("fused", [True, False])
def test_a_vit_is_as_computed_by_hand(fused: bool) -> None:
    flops = count(vit(fused), torch.randn(3, 3, 16, 16))
    want = {"patch_embed.proj.weight": 2 * (TOKENS - 1) * WIDTH * 3 * PATCH**2, "head.weight": 2 * WIDTH * CLASSES}
    layers = {"attn.qkv": 3 * WIDTH**2, "attn.proj": WIDTH**2, "mlp.fc1": WIDTH * HIDDEN, "mlp.fc2": WIDTH * HIDDEN}
    for block in range(DEPTH):
        for layer, weights in layers.items():
            want[f"blocks.{block}.{layer}.weight"] = 2 * TOKENS * weights
    assert used(flops) == want
    assert flops.total == sum(want.values()) + DEPTH * 2 * 2 * TOKENS**2 * WIDTH


def test_a_conv_net_is_as_computed_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1),
        nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Flatten(), nn.Linear(2 * 16 * 16, CLASSES),
    )  # fmt: skip
    flops = count(model, torch.randn(2, 3, 16, 16))
    assert used(flops) == {
        "0.weight": 2 * 64 * 8 * 3 * 9,
        "2.weight": 2 * 64 * 8 * 9,
        "3.weight": 2 * 64 * 8 * 4,
        "4.weight": 2 * 64 * 4 * 2 * 4,
        "6.weight": 2 * 512 * CLASSES,
    }
    assert flops.total == sum(flops.layers.values())


class Attending(nn.Module):
    """Self-attention by one packed weight, then attention to fewer tokens of another width by three."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 2, kdim=8, vdim=6, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        x = self.own(x, x, x, need_weights=False)[0]
        return self.cross(x, x[:, :4, :8], x[:, :4, :6], need_weights=False)[0]


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_is_as_computed_by_hand(training: bool) -> None:
    """Also in eval mode, where torch would run it as one operation that its counter does not know."""
    flops = count(Attending().train(training), torch.randn(2, 10, WIDTH))
    assert used(flops) == {
        "own.in_proj_weight": 2 * 10 * 3 * WIDTH**2,
        "own.out_proj.weight": 2 * 10 * WIDTH**2,
        "cross.q_proj_weight": 2 * 10 * WIDTH**2,
        "cross.k_proj_weight": 2 * 4 * WIDTH * 8,
        "cross.v_proj_weight": 2 * 4 * WIDTH * 6,
        "cross.out_proj.weight": 2 * 10 * WIDTH**2,
    }
    assert flops.total == sum(flops.layers.values()) + 2 * 2 * WIDTH * (10 * 10 + 10 * 4)


class Odd(nn.Module):
    """A layer used twice, one called by its weight alone, computed ones, one tied, one in lower precision."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.by_weight, self.unused = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(9, 9)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
        self.cast, self.raw = nn.Linear(5, 7), nn.Parameter(torch.randn(7, 3))
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.twice.weight

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.tied(self.twice(self.twice(x))), self.by_weight.weight[:, :])
        x = self.normed(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.cast(x)
        return x.float() @ self.raw


@pytest.mark.filterwarnings("error")
def test_flops_belong_to_the_weight_that_is_used() -> None:
    model = Odd()
    flops = count(torch.compile(model), torch.randn(1, 6))  # type: ignore[arg-type]
    assert used(flops) == {
        "twice.weight": 3 * 2 * 36, "by_weight.weight": 2 * 24, "cast.weight": 2 * 35, "raw": 2 * 21, "normed.weight": 2 * 20,
    }  # fmt: skip
    assert flops.layers["unused.weight"] == flops.layers["twice.bias"] == 0
    assert {name for name, _ in model.named_parameters()} <= set(flops.layers)


def test_zeros_are_skipped() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    with torch.no_grad():
        next(iter(model.parameters()))[:3] = 0
    flops = count(model, torch.randn(1, 8))
    shares = zero_shares(Targets.from_model(model, include=["*"]))
    assert shares == {"0.weight": 0.75, "1.weight": 0.0}
    assert flops.effective_layers(shares) == {"0.weight": 16.0, "0.bias": 0, "1.weight": 16.0, "1.bias": 0}
    assert flops.effective(shares) == 32
    assert flops.saved(shares) == pytest.approx(48 / 80)
    assert flops.saved({}) == 0


class Changing(nn.Module):
    """Changes what a forward pass can change."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        assert not torch.is_grad_enabled()
        assert not self.training
        return self.norm(self.fc(x + torch.rand(())))


def test_the_model_is_left_as_it_was() -> None:
    model = Changing()
    model.norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    count(model, torch.randn(2, 4, generator=torch.Generator()))
    with pytest.raises(ConfigError, match="does not run"):
        count(model, torch.randn(2, 5, generator=torch.Generator()))
    assert torch.equal(torch.rand(3), want)
    assert [m.training for m in (model, model.fc, model.norm)] == [True, True, False]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
