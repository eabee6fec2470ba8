"""A small pruned model to export, and what it is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SHAPE = (3, 8, 8)


def small_convnet() -> nn.Module:
    """Convolutions with BatchNorm and a linear layer, 60 % zeros, always the same."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 5),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(torch.rand_like(parameter) < 0.4)
        model(torch.randn(16, *SHAPE))  # statistics of BatchNorm
    return model.eval()


def images(number: int = 4) -> Tensor:
    return torch.randn(number, *SHAPE, generator=torch.Generator().manual_seed(1))
