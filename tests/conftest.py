from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from torch import nn

from tests.support import ROOT

# Tests run side by side, one on each core (pytest-xdist), and some start processes: none may take more than its own core.
# A test that needs two threads sets them. What a test starts finds the package and the tests wherever it runs.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, sys.path)]))
torch.set_num_threads(1)


def pytest_runtest_setup() -> None:
    """CI has a quarter of an hour: with ``TESTS_UNTIL``, in seconds since the epoch, no test begins later."""
    if time.time() > float(os.environ.get("TESTS_UNTIL", "inf")):
        pytest.skip("no time was left")


@pytest.fixture
def seeded() -> None:
    """Every test draws the same, whichever ran before it."""
    pl.seed_everything(3, verbose=False)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Fills the disk when it is called."""

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda: monkeypatch.setattr(os, "fsync", no_space)  # where some file systems say so


@pytest.fixture
def tiny_vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5
    )


@pytest.fixture
def tiny_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 16),
        nn.Linear(16, 5),
    )
