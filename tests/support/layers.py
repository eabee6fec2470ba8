"""Layers of many kinds, and a collector of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.calibration.layer_inputs import InputCollector
from lightning_cap.sparsity.targets import Targets


def output_energy(model: nn.Module, batch: Any) -> Tensor:
    out: Tensor = model(batch[0]).square().mean()
    return out


def collector(layer: nn.Module, inputs: list[Tensor], num_inputs: int = 0, **more: Any) -> InputCollector:
    targets = Targets.from_model(layer, include=["*weight"])
    return InputCollector(
        layer, targets, output_energy, [(x,) for x in inputs], num_inputs or sum(map(len, inputs)), **more
    )


def total(collector: InputCollector, name: str = "weight") -> Tensor:
    return torch.stack([grams[name].double() for grams in collector]).sum(0)


LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear on tokens": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "conv": (lambda: nn.Conv2d(3, 4, 3), (3, 7, 6)),
    "stride": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2)), (3, 8, 5)),
    "dilation": (lambda: nn.Conv2d(2, 4, 3, dilation=2, padding=2), (2, 7, 7)),
    "groups": (lambda: nn.Conv2d(6, 8, 3, groups=2, padding=1), (6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5)),
    "same": (lambda: nn.Conv2d(2, 3, (3, 5), padding="same"), (2, 5, 6)),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"), (2, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (4, 11)),
}


def layer_of(kind: str) -> tuple[Any, tuple[int, ...]]:
    make, shape = LAYERS[kind]
    return make(), shape
