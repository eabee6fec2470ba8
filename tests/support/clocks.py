"""A clock that tests move, and models that take time on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.sparsity.units import Slice, UnitGroup, Units


class FakeClock:
    """Stands still but for what its own calls take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def __deepcopy__(self, memo: dict[int, Any]) -> FakeClock:
        return self

    def call(self, *milliseconds: float) -> Callable[..., Any]:
        """A function that takes so long, one number after the other."""
        times: Iterator[float] = cycle(milliseconds)

        def work(*args: Any) -> None:
            self.now += next(times) / 1e3

        return work


#: For models whose layers take time on it; copies of them share it.
CLOCK = FakeClock()


class SlowLinear(nn.Linear):
    """Takes a microsecond for each weight and sample, and one to start."""

    def forward(self, x: Tensor) -> Tensor:
        CLOCK.now += 1e-6 * (1 + self.weight.numel() * len(x))
        return super().forward(x)


class SlowBlock(nn.Module):
    """A layer of some width inside a residual stream, and as much again for the sum."""

    def __init__(self, stream: int, width: int) -> None:
        super().__init__()
        self.up, self.down = SlowLinear(stream, width), SlowLinear(width, stream)

    def forward(self, x: Tensor) -> Tensor:
        out = x + self.down(self.up(x).relu())
        CLOCK.now += 1e-6 * x.numel()
        return out


class SlowNet(nn.Module):
    """Blocks alike around one stream, between a first and a last layer."""

    def __init__(self, stream: int = 6, width: int = 8, blocks: int = 5) -> None:
        super().__init__()
        self.first = SlowLinear(3, stream)
        self.blocks = nn.Sequential(*(SlowBlock(stream, width) for _ in range(blocks)))
        self.last = SlowLinear(stream, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(x)))


def slow_units(model: SlowNet, prefix: str = "", stream: bool = True) -> Units:
    """Of its stream, unless that is to stay, and of each block."""
    width, groups = model.first.out_features, []
    inside = [f"{prefix}blocks.{i}" for i in range(len(model.blocks))]
    if stream:
        made = [f"{prefix}first", *(f"{name}.down" for name in inside)]
        read = [*(f"{name}.up" for name in inside), f"{prefix}last"]
        groups.append(_group(f"{prefix}first", width, made, read))
    for name, block in zip(inside, model.blocks, strict=True):
        groups.append(_group(name, block.up.out_features, [f"{name}.up"], [f"{name}.down"]))
    return Units(groups)


def _group(name: str, size: int, made: list[str], read: list[str]) -> UnitGroup:
    index = torch.arange(size)[:, None]
    producers = [Slice(f"{layer}.{part}", 0, index) for layer in made for part in ("weight", "bias")]
    return UnitGroup(name, "neuron", size, tuple(producers), (), tuple(Slice(f"{r}.weight", 1, index) for r in read))


def slow_milliseconds(batch: int, stream: int, widths: list[int]) -> float:
    """What a `SlowNet` takes."""
    weights = 3 * stream + 2 * stream + sum(2 * stream * width for width in widths)
    return 1e-3 * (batch * (weights + stream * len(widths)) + 2 + 2 * len(widths))
