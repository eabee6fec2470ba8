from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_cap import CyclicLinearLR
from tests.support.toy import Toy, callback, loaders, trainer
from tests.support.watch import Watch

pytestmark = pytest.mark.usefixtures("seeded")


def test_learning_rate_restarts_with_each_cycle(tmp_path: Path) -> None:
    watch = Watch()
    trainer(tmp_path, callback({1: 0.5, 3: 0.75}), watch, max_epochs=5).fit(Toy(), **loaders())
    top, low = 1e-2, 1e-4
    for start, length in ((0, 4), (4, 8), (12, 8)):  # the dense stretch is a cycle too
        expected = [top - (top - low) * (t % length) / length for t in range(1, length + 1)]
        assert watch.lr[start : start + length - 1] == pytest.approx(expected[:-1])


def test_other_schedulers_are_left_alone_with_one_warning(tmp_path: Path) -> None:
    class Cosine(Toy):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]

    with pytest.warns(UserWarning, match="CosineAnnealingLR has no restart") as record:
        trainer(tmp_path, callback()).fit(Cosine(), **loaders())
    assert sum("has no restart" in str(w.message) for w in record) == 1


def test_period_that_was_fixed_is_kept(tmp_path: Path) -> None:
    class Fixed(Toy):
        def configure_optimizers(self) -> Any:
            config = super().configure_optimizers()
            config["lr_scheduler"]["scheduler"] = CyclicLinearLR(config["optimizer"], min_lr=1e-4, period=2)
            return config

    watch = Watch()
    trainer(tmp_path, callback({1: 0.5}), watch, max_epochs=2).fit(Fixed(), **loaders())
    assert len(set(watch.lr)) == 2


def test_max_steps_ends_the_last_cycle(tmp_path: Path) -> None:
    cb, watch = callback({1: 0.5}, dirpath=str(tmp_path)), Watch()
    trainer(tmp_path, cb, watch, max_epochs=-1, max_steps=10).fit(Toy(), **loaders())
    assert watch.lr[-2] < watch.lr[4]  # the cycle's last step; after it equation 8 begins anew
    assert (tmp_path / "sparsity=0.50.ckpt").exists()


def test_cycles_follow_a_gradient_accumulation_schedule(tmp_path: Path) -> None:
    class Rates(pl.Callback):
        def __init__(self) -> None:
            self.last: dict[int, float] = {}

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.last[trainer.current_epoch] = optimizer.param_groups[0]["lr"]

    rates = Rates()
    accumulation = GradientAccumulationScheduler(scheduling={0: 1, 1: 2, 2: 1})
    trainer(tmp_path, callback({1: 0.5}), accumulation, rates).fit(Toy(), **loaders())
    steps = 2 + 4 + 4  # of the cycle from epoch 1 to the end
    assert rates.last[3] == pytest.approx(1e-2 - (1e-2 - 1e-4) * (steps - 1) / steps)
