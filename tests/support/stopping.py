"""Runs that stop as by a crash, and what is compared when they have been resumed."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch


def averaging() -> pl.Callback:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks", reason="WeightAveraging needs lightning >= 2.6")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this lightning has no EMAWeightAveraging")
    return callbacks.EMAWeightAveraging(decay=0.8)


class CrashError(Exception):
    """Ends a run without any of Lightning's closing hooks."""


class StopAfter(pl.Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epochs:
            raise CrashError


def assert_same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
