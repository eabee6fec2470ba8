from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_cap.errors import DataError
from lightning_cap.pruners import Magnitude, Pruner, Taylor
from lightning_cap.trainer.records import EventRecord
from lightning_cap.utilities.records import read_records
from tests.support.toy import Toy, callback, cap, loaders, trainer

pytestmark = pytest.mark.usefixtures("seeded")


def test_logs_go_to_every_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="logs")
    trainer(tmp_path, callback(), logger=logger).fit(Toy(), **loaders())
    text = Path(logger.log_dir, "metrics.csv").read_text()
    header = text.splitlines()[0]
    for name in (
        "cap/sparsity",
        "cap/layer_sparsity/net.4.weight",
        "cap/predicted_loss",
        "cap/after/val_acc",
        "cap/seconds/solve",
    ):
        assert name in header.split(",")
    assert Path(logger.log_dir, "checkpoints", "sparsity=0.50.ckpt").exists()


@pytest.mark.parametrize("pruner", [Magnitude(), Taylor(num_gradients=16), cap(num_gradients=16)], ids=repr)
def test_nothing_but_a_loss_is_called_one(tmp_path: Path, pruner: Pruner, caplog: pytest.LogCaptureFixture) -> None:
    cb = callback({1: 0.5}, pruner=pruner, dirpath=str(tmp_path), num_recomputations=2)
    logger = CSVLogger(tmp_path, name="logs")
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, cb, max_epochs=2, logger=logger).fit(Toy(), **loaders())
    (event,) = read_records(tmp_path / "events.jsonl", EventRecord)
    (line,) = [record.getMessage() for record in caplog.records if "pruned to" in record.getMessage()]
    predicts = type(pruner).predicts_loss
    assert (event.predicted_loss is not None) == predicts
    assert ("loss increase" in line) == predicts
    assert ("cap/predicted_loss" in Path(logger.log_dir, "metrics.csv").read_text()) == predicts
    assert predicts or json.loads((tmp_path / "events.jsonl").read_text())["predicted_loss"] is None


def test_a_folder_with_foreign_records_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "exports.jsonl").write_text('{"epoch": 1, "target": 0.5}\n')
    module = Toy()
    with pytest.raises(DataError, match=r"exports.jsonl, line 1: .* move the file away"):
        trainer(tmp_path, callback(dirpath=str(tmp_path))).fit(module, **loaders())
    assert module.batches == []
    cb = callback({1: 0.5}, dirpath=str(tmp_path), save="none")  # writes none
    trainer(tmp_path, cb, max_epochs=2).fit(module, **loaders())
    assert cb.masks.global_sparsity == 0.5
