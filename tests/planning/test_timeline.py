"""Learning rates of a plan against those of the run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from lightning_cap import CyclicLinearLR
from lightning_cap.data import DigitsDataModule
from lightning_cap.planning import plan_fit
from lightning_cap.planning.run_plan import TimelinePlan
from lightning_cap.pruners import Magnitude
from tests.support.planned import QUICK, configured, pruning, small_model


class _Rates(pl.Callback):
    """Learning rate of the first and the last step of each epoch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen.append([])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.seen[-1].append(trainer.optimizers[0].param_groups[0]["lr"])


SCHEDULERS: dict[str, Any] = {
    "cyclic": lambda optimizer: CyclicLinearLR(optimizer, min_lr=1e-5),
    "period": lambda optimizer: CyclicLinearLR(optimizer, min_lr=1e-5, period=7),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 12),
    "none": None,
}


def _timeline(make: Any, *callbacks: pl.Callback, **options: Any) -> TimelinePlan:
    trainer = configured(*callbacks, **options)
    found = plan_fit(trainer, small_model(lr_scheduler=make), DigitsDataModule(batch_size=512), QUICK).timeline
    assert found is not None
    return found


@pytest.mark.filterwarnings("ignore:CosineAnnealingLR has no restart")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_are_those_of_the_run(name: str) -> None:
    def callback() -> pl.Callback:
        return pruning(schedule={2: 0.5, 4: 0.75}, pruner=Magnitude(), save="none", evaluate=False)

    found = _timeline(SCHEDULERS[name], callback())
    rates = _Rates()
    trainer = configured(callback(), rates, limit_val_batches=0, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(small_model(lr_scheduler=SCHEDULERS[name]), datamodule=DigitsDataModule(batch_size=512))
    assert found.steps == len(rates.seen[0]) == 2
    assert [point.lr for point in found.points] == pytest.approx([seen[0] for seen in rates.seen])
    assert [point.last_lr for point in found.points] == pytest.approx([seen[-1] for seen in rates.seen])


def test_rates_of_epochs_and_of_metrics() -> None:
    assert _timeline(lambda o: ReduceLROnPlateau(o)).scheduler == "ReduceLROnPlateau"
    assert {point.lr for point in _timeline(lambda o: ReduceLROnPlateau(o)).points} == {5e-4}


def test_long_runs_and_runs_without_an_end() -> None:
    make = SCHEDULERS["cyclic"]
    long = _timeline(make, max_epochs=5000, limit_train_batches=1)
    assert long.epochs == 5000
    assert len(long.points) <= 1001
    assert _timeline(None, max_epochs=-1, limit_train_batches=1).epochs == -1
    few = _timeline(None, max_epochs=-1, max_steps=5)
    assert few.epochs == 3


def test_the_model_is_not_trained() -> None:
    model = small_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    plan_fit(configured(pruning()), model, DigitsDataModule(batch_size=64), QUICK)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
