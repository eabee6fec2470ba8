from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_cap.errors import ConfigError
from lightning_cap.trainer.calibration import calibration_loss
from lightning_cap.trainer.isolation import preserve_state, suppress_logging
from tests.support.toy import Toy, ToyData, callback, cap, loaders, trainer


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


class Recording(Toy):
    """Keeps which samples it computes a calibration loss on."""

    def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y, index = batch
        self.seen_in_a_tensor[index] = True
        return nn.functional.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch[:2], batch_idx)

    def setup(self, stage: str) -> None:
        self.seen_in_a_tensor = torch.zeros(64, dtype=torch.bool)  # no plain attribute, which would be put back


class Numbered(ToyData):
    def __getitem__(self, index: int) -> Any:
        return (*super().__getitem__(index), index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (Numbered()[i] for i in range(64))


@pytest.mark.filterwarnings("ignore:.*overfit")
@pytest.mark.parametrize("amount", [2, 0.5])
@pytest.mark.parametrize("stream", [False, True])
def test_calibration_draws_from_what_is_overfitted(tmp_path: Path, amount: Any, stream: bool) -> None:
    if stream and amount == 0.5:
        pytest.skip("Lightning cannot take a fraction of a stream")
    data = DataLoader(Stream(), batch_size=16) if stream else DataLoader(Numbered(), batch_size=16, shuffle=True)
    module, cb = Recording(), callback({0: 0.5}, pruner=cap(num_gradients=60, samples_per_gradient=2), evaluate=False)
    trainer(tmp_path, cb, max_epochs=1, overfit_batches=amount, limit_val_batches=0).fit(module, data)
    assert module.seen_in_a_tensor.nonzero().flatten().tolist() == list(range(32))


def test_several_calibration_loaders_are_refused(tmp_path: Path) -> None:
    class Several(Toy):
        def calibration_dataloader(self) -> Any:
            return given[0]

    loader, given = DataLoader(ToyData(), batch_size=8), list[Any]([None])
    for wrong in ([loader, loader], {"a": loader}, [loader], 3, None, "data"):
        given[0] = wrong
        with pytest.raises(ConfigError, match=r"calibration_dataloader: it returned .*Return one DataLoader"):
            trainer(tmp_path, callback({0: 0.5}), max_epochs=1).fit(Several(), **loaders())
    given[0] = [next(iter(loader))] * 2  # batches, which can be read again
    cb = callback({0: 0.5}, pruner=cap(num_gradients=8), save="none")
    trainer(tmp_path, cb, max_epochs=1).fit(Several(), **loaders())
    assert cb.masks.global_sparsity == 0.5
