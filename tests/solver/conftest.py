from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from torch import Tensor

from lightning_cap import solver
from lightning_cap.solver import Elimination
from lightning_cap.solver.backend import Backend


@pytest.fixture(params=["numba", "torch"])
def cpu_backend(request: pytest.FixtureRequest) -> Backend:
    """Each of the two that run on every machine; the third is in `tests/kernels/test_triton.py`."""
    backend: Backend = request.param
    return backend


@pytest.fixture
def eliminate(cpu_backend: Backend) -> Callable[..., Elimination]:
    return partial(solver.eliminate, backend=cpu_backend)


@pytest.fixture
def reconstruct(cpu_backend: Backend) -> Callable[..., Tensor]:
    return partial(solver.reconstruct, backend=cpu_backend)
