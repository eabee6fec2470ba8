"""A problem whose loss is known: least squares at their minimum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_cap.pruners import PruneResult
from lightning_cap.sparsity.targets import Targets


class Quadratic:
    """Independent least-squares problems at their minimum: ``1/2 mean_i (x_i · (w - w0))²``, so each gradient outer
    product of ``x_i`` is the Hessian's own."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], n: int = 200, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x: dict[str, Tensor] = {}
        self.w0: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            d = torch.Size(shape).numel()
            mix = torch.eye(d) + 2.0 * torch.randn(d, d, generator=generator) / d**0.5
            self.x[name] = torch.randn(n, d, generator=generator) @ mix
            self.w0[name] = torch.randn(shape, generator=generator)

    @property
    def targets(self) -> Targets:
        return Targets({name: nn.Parameter(w.clone()) for name, w in self.w0.items()})

    @property
    def rows(self) -> list[dict[str, Tensor]]:
        rows = {name: x.view(-1, *self.w0[name].shape) for name, x in self.x.items()}
        return [{name: r[i : i + 64] for name, r in rows.items()} for i in range(0, 200, 64)]

    def increase(self, result: PruneResult, block_size: int, damp: float = 0.0) -> float:
        """``1/2 Δᵀ (F + damp) Δ`` summed over blocks, in float64 from the samples."""
        total = 0.0
        for name, w0 in self.w0.items():
            delta = (result.weights[name].double() - w0.double()).flatten()
            for d, x in zip(delta.split(block_size), self.x[name].double().split(block_size, 1), strict=True):
                total += 0.5 * float((x @ d).square().mean() + damp * d.square().sum())
        return total
