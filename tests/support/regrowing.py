"""Runs in which weights come back: dense phases (AC/DC), drop and grow (RigL)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_cap.pruners import DropAndGrow, Pruner
from lightning_cap.schedules import AlternatingSchedule, SparsitySchedule
from tests.support.toy import Toy, callback, loaders, trainer
from tests.support.watch import Watch

ACDC = AlternatingSchedule(0.75, start_epoch=1, sparse_epochs=2, dense_epochs=1)  # events at 1, 3, 4 of 6 epochs


def rigl(**kwargs: Any) -> DropAndGrow:
    return DropAndGrow(**{"num_gradients": 4, "samples_per_gradient": 8, **kwargs})


def fit(folder: Path, schedule: SparsitySchedule, pruner: Pruner, *more: pl.Callback, **kwargs: Any) -> Any:
    """The module, the callback and what a `Watch` saw in a run of six epochs of four steps."""
    module, watch = Toy(kwargs.pop("optimizer", "adamw")), Watch()
    cb = callback(schedule, pruner=pruner, dirpath=str(folder / "out"), **kwargs.pop("callback", {}))
    trainer(folder, cb, watch, *more, **{"max_epochs": 6, **kwargs}).fit(module, **loaders())
    return module, cb, watch
