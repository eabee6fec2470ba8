"""A whole run whose events have memory for a part of the Fisher only."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_cap.calibration.gradients import rows_at_once
from lightning_cap.comparison import compare
from lightning_cap.errors import ConfigError
from lightning_cap.sparsity.targets import Targets
from tests.support.toy import Toy, callback, cap, loaders, trainer


def _limit(passes: int) -> int:
    """Memory for so many passes, in bytes."""
    targets = Targets.from_model(Toy())
    rows = 4 * targets.numel * rows_at_once(targets)
    for limit in range(rows, 100 * rows, 100):
        try:
            plan = cap(max_memory=limit).plan(targets, rows_bytes=rows)
        except ConfigError:
            continue
        if plan.passes <= passes:
            assert plan.passes == passes
            return limit
    raise AssertionError


def test_events_in_passes_give_the_same_run(tmp_path: Path) -> None:
    weights = []
    for memory in (None, _limit(2)):
        pl.seed_everything(3, verbose=False)
        module = Toy()
        cb = callback(pruner=cap(max_memory=memory), dirpath=str(tmp_path / str(memory)))
        trainer(tmp_path, cb).fit(module, **loaders())
        weights.append(module.state_dict())
        lines = (tmp_path / str(memory) / "events.jsonl").read_text().splitlines()
        assert all(f'"passes": {1 if memory is None else 2}.0' in line for line in lines)
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])


def test_a_comparison_in_passes_gives_the_same_records(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> object:
            return loaders()["train_dataloaders"]

        def val_dataloader(self) -> object:
            return loaders()["val_dataloaders"]

    found = []
    for memory in (None, _limit(2)):
        pl.seed_everything(3, verbose=False)
        module = Toy()
        pruner = cap(max_memory=memory)
        found.append(compare(trainer(tmp_path), module, pruner, [0.5, 0.8], datamodule=Data(), loss_samples=0))
    assert [records[1].stats["passes"] for records in found] == [1, 2]
    for one, other in zip(*found, strict=True):
        assert one.predicted_loss == pytest.approx(other.predicted_loss, rel=1e-6)
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5)
