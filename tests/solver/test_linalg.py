from __future__ import annotations

import pytest
import torch

from lightning_cap.solver.linalg import FLOAT64_CONDITION, restrict, spd_inverse, spd_solve


def _spd(k: int, B: int, dtype: torch.dtype = torch.float32, condition: float = 100.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(B)
    basis = torch.linalg.qr(torch.randn(k, B, B, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), B, dtype=torch.float64)
    return (basis * values @ basis.mT).to(dtype)


def test_restrict_keeps_the_alive_part_and_nothing_else() -> None:
    fisher = _spd(2, 5)
    alive = torch.tensor([[True, False, True, True, False], [False] * 5])
    before = fisher.clone()
    matrix, roots = restrict(fisher, alive, torch.tensor([0.5, 2.0], dtype=torch.float64))
    A = [0, 2, 3]
    scaled_back = matrix * roots.unsqueeze(-1) * roots.unsqueeze(-2)
    torch.testing.assert_close(scaled_back[0][A][:, A], fisher[0][A][:, A] + 0.5 * torch.eye(3))
    assert not matrix[0][[1, 4]][:, A].any()
    assert (matrix.diagonal(dim1=-2, dim2=-1) == 1).all()
    assert torch.equal(matrix[1], torch.eye(5))
    assert torch.equal(fisher, before)


def test_a_diagonal_that_is_not_positive_cannot_be_scaled() -> None:
    fisher = torch.eye(3).repeat(2, 1, 1)
    fisher[0, 1, 1] = -1.0
    matrix, _ = restrict(fisher, torch.ones(2, 3, dtype=torch.bool), torch.full((2,), 1e-3, dtype=torch.float64))
    assert spd_inverse(matrix)[1].tolist() == [False, True]


def test_the_condition_does_not_depend_on_the_scale_of_the_weights() -> None:
    correlated = _spd(1, 8)
    far = torch.logspace(-6, 6, 8)
    assert spd_inverse(correlated * far * far.unsqueeze(-1))[1].all()


@pytest.mark.parametrize("B", [1, 7, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_and_solve(B: int, dtype: torch.dtype) -> None:
    matrix = _spd(3, B, dtype)
    inverse, well_conditioned = spd_inverse(matrix)
    assert well_conditioned.all()
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(inverse @ matrix, torch.eye(B, dtype=dtype).expand(3, B, B), atol=tolerance, rtol=0)
    rhs = torch.randn(3, B, dtype=dtype)
    torch.testing.assert_close((matrix @ spd_solve(matrix, rhs)[0][..., None])[..., 0], rhs, atol=tolerance, rtol=0)


def test_each_block_is_judged_by_itself() -> None:
    good, bad = _spd(1, 8)[0], _spd(1, 8, condition=1e6)[0]
    indefinite, broken = good - 2 * torch.eye(8), torch.full((8, 8), float("nan"))
    batch = torch.stack([indefinite, good, bad, broken, good])
    inverse, well_conditioned = spd_inverse(batch)
    assert well_conditioned.tolist() == [False, True, False, False, True]
    assert torch.equal(inverse[1], spd_inverse(good[None])[0][0])
    _, well_conditioned = spd_inverse(batch.double())
    assert well_conditioned.tolist() == [False, True, True, False, True]
    nearly_one = 1 - 0.25 / FLOAT64_CONDITION
    _, well_conditioned = spd_inverse(torch.tensor([[[1.0, nearly_one], [nearly_one, 1.0]]], dtype=torch.float64))
    assert not well_conditioned.any()
