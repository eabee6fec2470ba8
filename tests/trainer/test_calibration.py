from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_cap.trainer.calibration import calibration_loss
from lightning_cap.trainer.isolation import preserve_state, suppress_logging
from tests.support.toy import Toy


def batch() -> Any:
    return torch.randn(8, 12), torch.randint(4, (8,))


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
