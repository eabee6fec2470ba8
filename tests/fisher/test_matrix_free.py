"""Inverses from gradient rows alone, against dense float64 ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_cap.fisher.matrix_free import DynamicInverse, Inverse, StaticInverse
from tests.references.dense import damped_fisher

INVERSES: dict[str, Callable[[Tensor, Tensor], Inverse]] = {"dynamic": DynamicInverse, "static": StaticInverse}


@pytest.mark.parametrize("mode", INVERSES)
@pytest.mark.parametrize(("N", "B"), [(1, 5), (6, 40), (40, 40), (120, 24)])
@pytest.mark.parametrize("damp", [1e-1, 1e-4, 1e-8])
@pytest.mark.parametrize("masked", [False, True])
def test_inverses_against_dense_ones(mode: str, N: int, B: int, damp: float, masked: bool) -> None:
    generator = torch.Generator().manual_seed(N)
    alive = torch.rand(3, B, generator=generator) >= (0.3 if masked else 0.0)
    rows = torch.randn(3, N, B, generator=generator, dtype=torch.float64) * alive.unsqueeze(1)
    vectors = torch.randn(3, B, generator=generator, dtype=torch.float64)
    damps = damp * torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64)
    inverse = INVERSES[mode](rows.clone(), damps)
    assert inverse.well_conditioned.all()
    for k in range(3):
        expected = np.linalg.inv(damped_fisher(rows[k].numpy(), float(damps[k])))
        scale = np.abs(expected).max() * 1e-8
        np.testing.assert_allclose(inverse.diagonal()[k], np.diag(expected), rtol=1e-5, atol=scale)
        products = expected @ vectors[k].numpy()
        np.testing.assert_allclose(inverse.times(vectors)[k], products, rtol=1e-5, atol=10 * scale)
