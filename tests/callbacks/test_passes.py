"""A whole run whose events have memory for a part of the Fisher only."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.comparison import compare
from lightning_cap.pruners import CAP
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.calibration import calibration_loss
from lightning_cap.trainer.isolation import suppress_logging
from tests.support.memory import with_passes
from tests.support.toy import Toy, callback, cap, loaders, trainer

#: Each pass would shrink towards the mean of its own blocks.
unshrunk = partial(cap, shrinkage=0.0)


def two_passes() -> CAP:
    """With memory for so much of the Fisher of `Toy`."""
    module = Toy()
    targets = Targets.from_model(module)
    batches = loaders()["train_dataloaders"]
    loss = calibration_loss(module)
    with suppress_logging(module):
        source = GradientCollector(module.eval(), targets, loss, batches, 64).memory()
    most, least = (int(with_passes(passes, unshrunk, targets, source).max_memory) for passes in (1, 2))
    return unshrunk(max_memory=(most + least) // 2)


def test_events_in_passes_give_the_same_run(tmp_path: Path) -> None:
    weights = []
    for passes, pruner in ((1, unshrunk()), (2, two_passes())):
        pl.seed_everything(3, verbose=False)
        module = Toy()
        cb = callback(pruner=pruner, dirpath=str(tmp_path / str(passes)))
        trainer(tmp_path, cb).fit(module, **loaders())
        weights.append(module.state_dict())
        lines = (tmp_path / str(passes) / "events.jsonl").read_text().splitlines()
        assert all(f'"passes": {passes}.0' in line for line in lines)
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])


def test_a_comparison_in_passes_gives_the_same_records(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> object:
            return loaders()["train_dataloaders"]

        def val_dataloader(self) -> object:
            return loaders()["val_dataloaders"]

    found = []
    for pruner in (unshrunk(), two_passes()):
        pl.seed_everything(3, verbose=False)
        module = Toy()
        found.append(compare(trainer(tmp_path), module, pruner, [0.5, 0.8], datamodule=Data(), loss_samples=0))
    assert [records[1].stats["passes"] for records in found] == [1, 2]
    for one, other in zip(*found, strict=True):
        assert one.predicted_loss == pytest.approx(other.predicted_loss, rel=1e-6)
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5)
