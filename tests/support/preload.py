"""What the server of test processes imports once, and each of them has when it is forked. See `processes.py`.

No gradient may be computed here, and no thread started: neither survives a fork.
"""

import contextlib
import io

import lightning.pytorch  # noqa: F401
import pytest  # noqa: F401 - its command is the main module of every process
import timm  # noqa: F401
import torch

import lightning_cap.cli
import tests.support.toy  # noqa: F401
from lightning_cap.solver import eliminate, reconstruct
from lightning_cap.sparsity.patterns import Unstructured
from tests.support import ROOT


def load_compiled_solver() -> None:
    """Have the compiled loops in memory."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 32, 16, generator=generator)
    fisher, weights, alive = rows.mT @ rows / 32, torch.randn(2, 16, generator=generator), torch.ones(2, 16).bool()
    out = eliminate(fisher, weights, alive, 1e-4, Unstructured())
    reconstruct(fisher, weights, alive, out.rank < 4, out.damp, out.use_float64)


def load_parser() -> None:
    """Have in memory what the command line finds out of signatures and docstrings."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        lightning_cap.cli.main(["fit", "--config", str(ROOT / "configs/digits_gradual.yaml"), "--no-such-option"])


load_compiled_solver()
load_parser()
