from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_cap.trainer.calibration import calibration_loss
from lightning_cap.trainer.evaluation import evaluate
from lightning_cap.trainer.isolation import preserve_state, suppress_logging
from tests.support.toy import Toy, ToyData, loaders, trainer


def batch() -> Any:
    return torch.randn(8, 12), torch.randint(4, (8,))


def test_undisturbed_restores_flags_buffers_and_generators() -> None:
    module = Toy()
    module.net[3].eval()
    flags = [m.training for m in module.modules()]
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    state = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())

    def disturb() -> None:
        with preserve_state(module):
            assert not any(m.training for m in module.modules())
            module.train()
            module(torch.randn(8, 12))  # BatchNorm counts it
            torch.rand(3), random.random(), np.random.rand(3)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        disturb()
    assert [m.training for m in module.modules()] == flags
    assert all(torch.equal(b, buffers[name]) for name, b in module.named_buffers())
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    assert (state[2] == np.random.get_state()[1]).all()


def test_calibration_loss_takes_training_step_without_logs_and_metrics() -> None:
    class Dict(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.many = MetricCollection({"a": MulticlassAccuracy(4), "b": MulticlassAccuracy(4)})

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            value = super().training_step(batch, batch_idx)
            self.many(self(batch[0]), batch[1])
            self.log_dict({"x": 1.0}, on_step=True)
            self.log("b", self.many["b"])
            return {"loss": value, "other": 1}

    module = Dict()
    with preserve_state(module), suppress_logging(module):
        data = batch()
        value = calibration_loss(module)(module, data)
        assert value.requires_grad
        assert torch.equal(value, nn.functional.cross_entropy(module(data[0]), data[1]))
    assert module.train_acc.update_count == 0
    assert isinstance(module.many, MetricCollection)
    assert "log" not in module.__dict__


def test_calibration_step_wins_and_steps_may_take_fewer_arguments() -> None:
    class Own(Toy):
        def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return torch.tensor(float(batch_idx)) + 7

    class Short(Toy):
        def training_step(self, batch: Any) -> torch.Tensor:  # type: ignore[override]
            return torch.tensor(3.0)

    for module, value in ((Own(), 7.0), (Short(), 3.0)):
        with suppress_logging(module):
            assert calibration_loss(module)(module, batch()) == value


def test_evaluate_is_what_validation_logs(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                seen["mine"] = evaluate(trainer, pl_module)
                seen["logged"] = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val")}
                seen["count"] = pl_module.val_acc.update_count

    class Several(Toy):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    data = {
        **loaders(),
        "val_dataloaders": DataLoader(ToyData(37, noise=0.0), batch_size=16),
    }  # a last batch of another size
    trainer(tmp_path, Look(), max_epochs=2).fit(Several(scheduler=False), **data)
    assert seen["mine"] == pytest.approx(seen["logged"])
    assert set(seen["mine"]) == {"val_acc", "val_loss"}
    assert seen["count"] == 0  # metrics were updated in copies


def test_evaluate_respects_limits(tmp_path: Path) -> None:
    calls: list[int] = []

    class Counts(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            calls.append(batch_idx)

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            calls.clear()
            evaluate(trainer, pl_module)
            assert calls == list(range(trainer.limit_val_batches))

    for limit in (0, 1):
        trainer(tmp_path, Look(), max_epochs=1, limit_val_batches=limit).fit(Counts(scheduler=False), **loaders())


def test_evaluate_may_stop_after_some_batches(tmp_path: Path) -> None:
    class Twice(Toy):
        seen: tuple[int, ...] = ()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            Twice.seen += (batch_idx,)

    module, t = Twice(), trainer(tmp_path)
    found: list[dict[str, float]] = []

    class Look(pl.Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            found.extend(evaluate(trainer, pl_module, batches) for batches in (None, 1, 9))

    t.callbacks.append(Look())  # type: ignore[attr-defined]
    t.validate(module, loaders()["val_dataloaders"], verbose=False)
    assert Twice.seen == (0, 1, 0, 0, 1, 0, 1)  # and the Trainer's own pass
    assert found[0] == found[2] != found[1]
