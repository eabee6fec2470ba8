"""Sums of products in packed triangles, against float64 by numpy."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from lightning_cap.kernels.cpu.packed import accumulate_blocks
from tests.support import ROOT

#: Block sizes below, at, and beyond whole vectors of 16 floats and of 8 doubles, and beyond the widest tile.
SIZES = (1, 3, 8, 15, 16, 17, 31, 40, 64, 100, 192)
CHECK = "from tests.kernels.test_packed import check, SIZES; import numpy; [check(B, 33, numpy.float32) for B in SIZES]"


def check(B: int, n: int, dtype: type) -> None:
    rows = np.random.default_rng(B).standard_normal((n, 4, B)).astype(dtype)
    packed = np.full((4, B * (B + 1) // 2), 2, dtype)
    accumulate_blocks(packed, rows, 1, 3)
    reversed_rows = rows[..., ::-1].astype(np.float64)
    full = np.einsum("ski,skj->kij", reversed_rows, reversed_rows) + 2
    lower = np.tril_indices(B)
    tolerance = 30 * np.finfo(dtype).eps
    np.testing.assert_allclose(packed[1:3], full[1:3, lower[0], lower[1]], rtol=tolerance, atol=n * tolerance)
    assert (packed[[0, 3]] == 2).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 7, 32])
def test_sums_of_products(n: int, dtype: type) -> None:
    for B in SIZES:
        check(B, n, dtype)


def test_rows_that_are_not_finite_stay_in_their_own_entries() -> None:
    """Vectors reach beyond the diagonal and beyond a block; what is there must not leak."""
    rows = np.ones((2, 3, 17), np.float32)
    rows[1, 1, 4] = np.inf
    packed = np.zeros((3, 17 * 18 // 2), np.float32)
    accumulate_blocks(packed, rows, 0, 3)
    assert (packed[[0, 2]] == 2).all()
    row, column = np.tril_indices(17)
    place = 16 - 4  # of weight 4 in reversed order
    touched = (row == place) | (column == place)
    assert (packed[1, ~touched] == 2).all()
    assert np.isinf(packed[1, touched]).all()


@pytest.mark.slow
def test_with_half_the_registers() -> None:
    """The tile of machines without AVX-512 gives the same."""
    features = "-avx512f" if sys.platform == "darwin" else "+avx2,+fma,-avx512f"
    environment = {**os.environ, "NUMBA_CPU_FEATURES": features, "PYTHONPATH": str(ROOT)}
    kept = "from lightning_cap.kernels.cpu.gram import HEIGHT; assert HEIGHT == 4; "
    subprocess.run([sys.executable, "-c", kept + CHECK], env=environment, check=True)
