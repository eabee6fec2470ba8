from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_cap.errors import DataError
from tests.support.toy import Toy, callback, loaders, trainer

pytestmark = pytest.mark.usefixtures("seeded")


def test_logs_go_to_every_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="logs")
    trainer(tmp_path, callback(), logger=logger).fit(Toy(), **loaders())
    text = Path(logger.log_dir, "metrics.csv").read_text()
    header = text.splitlines()[0]
    for name in (
        "cap/sparsity",
        "cap/sparsity/net.4.weight",
        "cap/predicted_loss",
        "cap/after/val_acc",
        "cap/seconds/solve",
    ):
        assert name in header.split(",")
    assert Path(logger.log_dir, "checkpoints", "sparsity=0.50.ckpt").exists()


@pytest.mark.parametrize("name", ["events.jsonl", "exports.jsonl"])
def test_a_folder_with_foreign_records_is_refused_before_training(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"epoch": 1, "target": 0.5}\n')
    module = Toy()
    with pytest.raises(DataError, match=rf"{name}, line 1: .* move the file away"):
        trainer(tmp_path, callback(dirpath=str(tmp_path))).fit(module, **loaders())
    assert module.batches == []
    cb = callback({1: 0.5}, dirpath=str(tmp_path), save="none")  # writes none
    trainer(tmp_path, cb, max_epochs=2).fit(module, **loaders())
    assert cb.masks.global_sparsity == 0.5
