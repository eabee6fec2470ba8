"""What the server of test processes imports once, and each of them has when it is forked. See `processes.py`.

No gradient may be computed here, and no thread started: neither survives a fork.
"""

import lightning.pytorch  # noqa: F401
import pytest  # noqa: F401 - its command is the main module of every process
import timm  # noqa: F401
import torch

import lightning_cap.cli  # noqa: F401
import tests.support.toy  # noqa: F401
from lightning_cap.solver import eliminate, reconstruct
from lightning_cap.sparsity.patterns import Unstructured


def load_compiled_solver() -> None:
    """Have the compiled loops in memory."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 32, 16, generator=generator)
    fisher, weights, alive = rows.mT @ rows / 32, torch.randn(2, 16, generator=generator), torch.ones(2, 16).bool()
    out = eliminate(fisher, weights, alive, 1e-4, Unstructured())
    reconstruct(fisher, weights, alive, out.rank < 4, out.damp, out.use_float64)


load_compiled_solver()
