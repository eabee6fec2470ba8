"""A small network with units of every kind, made by hand: channels of two readers, channels of a sum, heads, neurons."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_cap.sparsity import Targets, UnitGroup, Units
from lightning_cap.sparsity.units import Layer, Slice, Width

HEADS, WIDTH = 4, 2


class SmallNet(nn.Module):
    """Images ``(n, 2, 5, 5)`` -> 3 classes. A gate, where there is one, multiplies the output of each unit of its group."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3)
        self.side = nn.Conv2d(6, 5, 1, bias=False)
        self.qkv = nn.Linear(5, 3 * HEADS * WIDTH)
        self.proj = nn.Linear(HEADS * WIDTH, 7)
        self.fc1 = nn.Linear(7, 12)
        self.fc2 = nn.Linear(12, 3)
        self.gates: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        a = self._gated("conv1", self.bn(self.conv1(x)), 1).relu()
        y = self._gated("conv2", (self.conv2(a) + self.side(a)[:, :, 1:-1, 1:-1]).relu(), 1)
        tokens = self.qkv(y.flatten(2).transpose(1, 2))
        q, k, v = tokens.unflatten(2, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        out = self._gated("attn", (q @ k.mT).softmax(-1) @ v, 1)
        z = self.proj(out.transpose(1, 2).flatten(2)).mean(1)
        hidden: Tensor = self.fc2(self._gated("fc1", nn.functional.gelu(self.fc1(z)), 1))
        return hidden

    def _gated(self, name: str, x: Tensor, dim: int) -> Tensor:
        if name not in self.gates:
            return x
        return x * self.gates[name].view([-1 if d == dim else 1 for d in range(x.dim())])


def lines(size: int, width: int = 1) -> Tensor:
    """Unit ``u`` has the entries from ``u·width`` on."""
    return torch.arange(size * width).view(size, width)


def small_units() -> Units:
    """Those of `SmallNet`."""
    one = lambda name, dim, size: Slice(name, dim, lines(size))  # noqa: E731
    heads = lines(HEADS, WIDTH)
    in_qkv = torch.cat([heads + part * HEADS * WIDTH for part in range(3)], dim=1)
    groups = [
        UnitGroup(
            "conv1",
            "channel",
            6,
            (one("conv1.weight", 0, 6),),
            (one("bn.weight", 0, 6), one("bn.bias", 0, 6)),
            (one("conv2.weight", 1, 6), one("side.weight", 1, 6)),
            (one("bn.running_mean", 0, 6), one("bn.running_var", 0, 6)),
        ),
        UnitGroup(
            "conv2",
            "channel",
            5,
            (one("conv2.weight", 0, 5), one("conv2.bias", 0, 5), one("side.weight", 0, 5)),
            (),
            (one("qkv.weight", 1, 5),),
        ),
        UnitGroup(
            "attn",
            "head",
            HEADS,
            (Slice("qkv.weight", 0, in_qkv), Slice("qkv.bias", 0, in_qkv)),
            (),
            (Slice("proj.weight", 1, heads),),
        ),
        UnitGroup(
            "fc1",
            "neuron",
            12,
            (one("fc1.weight", 0, 12), one("fc1.bias", 0, 12)),
            (),
            (one("fc2.weight", 1, 12),),
        ),
    ]
    conv1, conv2 = Width(6, {"conv1": 1}), Width(5, {"conv2": 1})
    layers = [
        Layer("conv1", 2 * 25 * 18 * 6, (conv1,)),
        Layer("conv2", 2 * 9 * 9 * 30, (conv1, conv2)),
        Layer("side", 2 * 25 * 30, (conv1, conv2)),
        Layer("qkv", 2 * 9 * 5 * 24, (conv2, Width(24, {"attn": 6}))),
        Layer("attn", 2 * 2 * 81 * 8, (Width(8, {"attn": 2}),)),
        Layer("proj", 2 * 9 * 8 * 7, (Width(8, {"attn": 2}),)),
        Layer("fc1", 2 * 7 * 12, (Width(12, {"fc1": 1}),)),
        Layer("fc2", 2 * 12 * 3, (Width(12, {"fc1": 1}),)),
    ]
    return Units(groups, layers, sum(layer.flops for layer in layers) + 100)


def small_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> SmallNet:
    """In eval mode, with running statistics that matter."""
    generator = torch.Generator().manual_seed(seed)
    model = SmallNet().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), model.bn.running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
        model.bn.running_var.copy_(0.5 + torch.rand(6, generator=generator))
    return model.to(dtype)


def small_targets(dtype: torch.dtype = torch.float32, seed: int = 0) -> Targets:
    """The weights of the units of such a network."""
    return small_units().targets(small_net(dtype, seed))


def gate_rows(units: Units, n: int, seed: int = 0, scale: float = 1.0) -> list[dict[str, Tensor]]:
    """Correlated gate gradients ``{group: (n, size)}`` in chunks of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for name, size in units.sizes.items():
        mix = torch.eye(size) + torch.randn(size, size, generator=generator)
        rows[name] = scale * torch.randn(n, size, generator=generator) @ mix
    cuts = [0, *range(5, n, 11), n]
    return [{k: v[a:b] for k, v in rows.items()} for a, b in pairwise(cuts)]


def images(n: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of images and labels."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 2, 5, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)
    return [(x[i : i + 8], y[i : i + 8]) for i in range(0, n, 8)]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean loss of a batch."""
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])
