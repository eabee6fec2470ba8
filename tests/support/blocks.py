"""Fisher blocks to eliminate, and whether an elimination is the oracle's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_cap.solver import Elimination
from tests.references.obs import obs_block

Eliminate = Callable[..., Elimination]
Reconstruct = Callable[..., Tensor]


def problem(kind: str, K: int, B: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Fisher ``(K, B, B)`` float32, weights ``(K, B)``, alive ``(K, B)`` with some masked entries."""
    generator = torch.Generator().manual_seed(1000 * B + seed)
    n = max(2, B // 4) if kind == "few" else 4 * B + 4
    mix = torch.eye(B, dtype=torch.float64) + 0.5 * torch.randn(B, B, generator=generator, dtype=torch.float64) / B**0.5
    rows = torch.randn(K, n, B, generator=generator, dtype=torch.float64) @ mix
    if kind == "scaled":  # the Fisher then spans eight orders of magnitude
        rows = rows * torch.logspace(-2, 2, B, dtype=torch.float64)[torch.randperm(B, generator=generator)]
    if kind == "duplicated":
        rows[..., B // 2 :] = rows[..., : B - B // 2]
    fisher = (rows.mT @ rows / n).float()
    weights = torch.randn(K, B, generator=generator)
    alive = torch.rand(K, B, generator=generator) > 0.1
    return (fisher + fisher.mT) / 2, weights, alive


def nearly_singular(K: int, B: int) -> Tensor:
    """Large gradients along few directions: eigenvalues from 1e3 to 1e-4, in no basis of the weights."""
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(K, B, B, generator=generator, dtype=torch.float64))[0]
    fisher = ((basis * torch.logspace(3, -4, B, dtype=torch.float64)) @ basis.mT).float()
    return (fisher + fisher.mT) / 2


def order_of(out: Elimination, block: int) -> list[int]:
    return out.rank[block].argsort(stable=True)[: int(out.steps[block])].tolist()


def assert_is_obs(
    out: Elimination, fisher: Tensor, weights: Tensor, alive: Tensor, nm: tuple[int, int] | None = None, *, tol: float
) -> None:
    """Every removal is the oracle's best up to ``tol``, and costs what the oracle says."""
    for k in range(len(fisher)):
        order = order_of(out, k)
        assert sorted(out.rank[k][out.rank[k] < len(weights[k])].tolist()) == list(range(len(order)))
        reference = obs_block(fisher[k].numpy(), weights[k].numpy(), alive[k].numpy(), float(out.damp[k]), nm, order)
        losses = out.losses[k, : len(order)].double().numpy()
        slack = tol * np.maximum.accumulate(np.append(reference.losses, 0.0))[-1] * 1e-2
        np.testing.assert_allclose(losses, reference.losses, rtol=tol, atol=slack)
        assert (np.array(reference.losses) <= np.array(reference.least) * (1 + tol) + slack).all()
        assert torch.isinf(out.losses[k, len(order) :]).all()
        best = obs_block(fisher[k].numpy(), weights[k].numpy(), alive[k].numpy(), float(out.damp[k]), nm)
        assert float(losses.sum()) == pytest.approx(sum(best.losses), rel=1e-3)
