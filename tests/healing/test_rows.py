"""Rows on their own supports, either way, against one dense solve for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_cap.healing.rows import RowSolver

pytestmark = pytest.mark.usefixtures("seeded")


def problem(groups: int, rows: int, size: int, density: float, samples: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(groups, samples, size, dtype=torch.float64) @ torch.randn(size, size, dtype=torch.float64)
    matrix = x.mT @ x
    matrix /= matrix.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    support = torch.rand(groups * rows, size) < density
    support[:, 0] = True
    return matrix, support, torch.randn(groups * rows, size, dtype=torch.float64)


def solved(matrix: Tensor, ridge: float, support: Tensor, rhs: Tensor, row: int) -> np.ndarray:
    full = matrix[row // (len(rhs) // len(matrix))].numpy() + ridge * np.eye(rhs.shape[1])
    kept = support[row].nonzero().squeeze(1).numpy()
    out = np.zeros(rhs.shape[1])
    out[kept] = np.linalg.solve(full[np.ix_(kept, kept)], rhs[row, kept].numpy())
    return out


@pytest.mark.parametrize(("groups", "rows"), [(1, 40), (3, 20)])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("ridge", [0.1, 1e-6])
def test_every_row_is_solved_on_its_support(groups: int, rows: int, density: float, ridge: float) -> None:
    matrix, support, rhs = problem(groups, rows, 24, density)
    solver = RowSolver(matrix, ridge, support, rhs)
    chosen = torch.arange(groups * rows)[torch.randperm(groups * rows)[:-3]]
    found = solver.solve(chosen)
    for row, x in zip(chosen.tolist(), found, strict=True):
        expected = solved(matrix, ridge, support, rhs, row)
        np.testing.assert_allclose(x.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        assert not x[~support[row]].any()
    assert solver.raised == 0


def test_what_does_not_factor_gets_a_larger_ridge() -> None:
    """Sums of float32 rows may be a little below zero somewhere, by more than a ridge that is next to nothing."""
    matrix, support, rhs = problem(1, 60, 24, 0.9)
    matrix[0] -= (3e-6 + torch.linalg.eigvalsh(matrix[0]).min()) * torch.eye(24)
    solver = RowSolver(matrix, 1e-12, support, rhs)
    found = solver.solve(torch.arange(60))
    assert bool(torch.isfinite(found).all())
    assert 0 < solver.raised <= 60
    full = support.all(1).nonzero().squeeze(1).tolist()
    assert full
    for row in full:
        np.testing.assert_allclose(found[row].numpy(), solved(matrix, 1e-5, support, rhs, row), rtol=1e-4)


def test_no_rows_are_no_work() -> None:
    matrix, support, rhs = problem(1, 4, 8, 0.5)
    assert RowSolver(matrix, 0.1, support, rhs).solve(torch.arange(0)).shape == (0, 8)
