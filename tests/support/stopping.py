"""Runs that stop as by a crash, and what is compared when they have been resumed."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from tests.support.toy import ToyData


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


class StatefulLoader(DataLoader):  # type: ignore[type-arg]
    """A loader that can go on in the middle of an epoch, as torchdata's does: its own order, its own position."""

    def __init__(self) -> None:
        super().__init__(ToyData(noise=0.0), batch_size=16)
        self.epoch, self.position, self.resume = -1, 0, False

    def __iter__(self) -> Any:
        if not self.resume:
            self.epoch, self.position = self.epoch + 1, 0
        self.resume = False
        order = torch.randperm(64, generator=torch.Generator().manual_seed(self.epoch)).split(16)
        while self.position < 4:
            self.position += 1
            yield torch.utils.data.default_collate([self.dataset[int(i)] for i in order[self.position - 1]])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position, self.resume = state["epoch"], state["position"], True
