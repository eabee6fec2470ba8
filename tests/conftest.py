from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.support import ROOT

# Tests run side by side, one on each core (pytest-xdist), and some start processes: none may take more than its own core.
# A test that needs two threads sets them. What a test starts finds the package and the tests wherever it runs.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, sys.path)]))
torch.set_num_threads(1)


@pytest.fixture
def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )


@pytest.fixture
def tiny_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 16),
        nn.Linear(16, 5),
    )


GradientRows = Callable[..., list[dict[str, Tensor]]]


@pytest.fixture
def gradient_rows() -> GradientRows:
    """Makes correlated random gradient rows for the targets, in chunks of uneven size."""

    def make(weights: Mapping[str, Tensor], n: int, seed: int = 0, scale: float = 1.0) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        rows = {}
        for name, weight in weights.items():
            d = weight.numel()
            mix = torch.eye(d) + torch.randn(d, d, generator=generator) / d**0.5
            rows[name] = (scale * torch.randn(n, d, generator=generator) @ mix).view(n, *weight.shape)
        cuts = [0, *range(5, n, 11), n]
        return [{k: v[a:b] for k, v in rows.items()} for a, b in pairwise(cuts)]

    return make
