from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from lightning_cap.solver.linalg import FLOAT64_CONDITION, restrict, spd_inverse, spd_solve
from lightning_cap.utilities.precision import full_float32


def _spd(k: int, B: int, dtype: torch.dtype = torch.float32, condition: float = 100.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(B)
    basis = torch.linalg.qr(torch.randn(k, B, B, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), B, dtype=torch.float64)
    return (basis * values @ basis.mT).to(dtype)


def test_restrict_keeps_the_alive_part_and_nothing_else() -> None:
    fisher = _spd(2, 5)
    alive = torch.tensor([[True, False, True, True, False], [False] * 5])
    before = fisher.clone()
    matrix = restrict(fisher, alive, torch.tensor([0.5, 2.0], dtype=torch.float64))
    A = [0, 2, 3]
    torch.testing.assert_close(matrix[0][A][:, A], fisher[0][A][:, A] + 0.5 * torch.eye(3))
    assert not matrix[0][[1, 4]][:, A].any()
    assert matrix[0][1, 1] == matrix[0].diagonal()[A].max()
    assert (matrix[1] == matrix[1].diagonal().diag()).all()
    assert (matrix[1].diagonal() > 0).all()
    assert torch.equal(fisher, before)


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
    _, well_conditioned = spd_inverse(
        torch.diag(torch.tensor([1.0, 0.5 / FLOAT64_CONDITION], dtype=torch.float64))[None]
    )
    assert not well_conditioned.any()


@contextmanager
def _by_backend(value: str) -> Iterator[None]:
    switch = torch.backends.cuda.matmul
    if not hasattr(switch, "fp32_precision"):
        pytest.skip("this torch has one global setting only")
    before = switch.fp32_precision
    switch.fp32_precision = value
    try:
        yield
    finally:
        switch.fp32_precision = before


@contextmanager
def _global(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _precision_of_cuda() -> str:
    matmul = torch.backends.cuda.matmul
    return getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_full_float32_restores_the_callers_setting(precision: str) -> None:
    with _global(precision):
        with suppress(KeyError), full_float32():
            assert _precision_of_cuda() == "ieee"
            raise KeyError
        assert _precision_of_cuda() == ("ieee" if precision == "highest" else "tf32")
        assert torch.get_float32_matmul_precision() == precision


def test_full_float32_after_the_newer_switch_was_used() -> None:
    with _by_backend("tf32"):
        with full_float32():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    with full_float32():
        pass


def test_full_float32_is_not_caught_by_autocast() -> None:
    a = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with full_float32():
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


@pytest.mark.slow
def test_large_blocks_finish_on_two_threads() -> None:
    """The batched inverse of MKL hangs here for n >= 160; ours must not."""
    code = """
import torch
torch.set_num_threads(2)
from lightning_cap.sparsity import Unstructured
from lightning_cap.solver import eliminate, reconstruct
g = torch.randn(24, 400, 192)
fisher = g.mT @ g / 400
for damp in (1.0, 1e-8):
    fisher[:, :, 0] *= damp ** 0.5; fisher[:, 0] *= damp ** 0.5
    w, alive = torch.randn(24, 192), torch.ones(24, 192, dtype=torch.bool)
    out = eliminate(fisher, w, alive, damp, Unstructured())
    r = reconstruct(fisher, w, alive, out.rank < 96, out.damp, out.use_float64)
    assert r.isfinite().all() and bool(out.use_float64.all()) is (damp < 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240, env=_two_threads())


def _two_threads() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
