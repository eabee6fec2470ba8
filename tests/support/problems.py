"""Targets, masks and gradient rows, drawn by a seed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from lightning_cap.pruners import PruneResult
from lightning_cap.sparsity.targets import Targets

MIXED = {"linear": (6, 8), "tiny": (1, 4), "conv": (4, 4, 2, 3), "odd": (7, 12)}
Rows = list[dict[str, Tensor]]


def random_targets(shapes: Mapping[str, tuple[int, ...]] = MIXED, seed: int = 0) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    return Targets({name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()})


def random_masks(targets: Mapping[str, Tensor], share: float, seed: int = 1) -> dict[str, Tensor]:
    """About this share of the weights is pruned."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(w.shape, generator=generator) >= share for name, w in targets.items()}


def gradient_rows(weights: Mapping[str, Tensor], n: int, seed: int = 0, scale: float = 1.0) -> Rows:
    """Correlated random gradient rows ``(n, *shape)``, in chunks of uneven size."""
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for name, weight in weights.items():
        d = weight.numel()
        mix = torch.eye(d) + torch.randn(d, d, generator=generator) / d**0.5
        rows[name] = (scale * torch.randn(n, d, generator=generator) @ mix).view(n, *weight.shape)
    cuts = [0, *range(5, n, 11), n]
    return [{k: v[a:b] for k, v in rows.items()} for a, b in pairwise(cuts)]


def same_result(a: PruneResult, b: PruneResult) -> bool:
    """Equal bit for bit."""
    same = all(torch.equal(a.weights[n], b.weights[n]) and torch.equal(a.masks[n], b.masks[n]) for n in a.weights)
    return same and a.saliency == b.saliency and a.predicted_loss == b.predicted_loss and a.sparsity == b.sparsity
