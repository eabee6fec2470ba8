"""Numbers and pictures of events, in the loggers that people use."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_cap.callbacks.loggers import SALIENCY, SPARSITY, accepted
from lightning_cap.pruners import Magnitude
from lightning_cap.trainer.records import EventRecord
from lightning_cap.utilities.records import read_records
from tests.support.toy import TARGET, Toy, callback, loaders, trainer
from tests.support.unit_runs import units

pytestmark = pytest.mark.usefixtures("seeded")

EXPECTED = {
    "cap/sparsity",
    f"cap/layer_sparsity/{TARGET}",
    "cap/predicted_loss",
    "cap/after/val_acc",
    "cap/seconds/solve",
}


def fit(folder: Path, *loggers: Logger, **options: Any) -> list[EventRecord]:
    cb = callback({0: 0.5, 1: 0.75}, dirpath=str(folder / "pruned"), **options)
    trainer(folder, cb, max_epochs=2, logger=list(loggers), log_every_n_steps=1).fit(Toy(), **loaders())
    return read_records(folder / "pruned/events.jsonl", EventRecord)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="toy")
    events = fit(tmp_path, logger)
    read = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0})
    read.Reload()
    tags = read.Tags()
    assert set(tags["scalars"]) >= EXPECTED
    assert [(e.step, e.value) for e in read.Scalars("cap/sparsity")] == [(0, 0.5), (4, 0.75)]
    assert [e.step for e in read.Images(SPARSITY)] == [0, 4]
    assert read.Images(SPARSITY)[0].width > 300
    first, second = (e.histogram_value for e in read.Histograms(SALIENCY))
    assert (first.num, second.num) == (256, 128), "weights that were not pruned yet"
    assert -20 < first.min < first.max < 2
    assert len(events) == 2


def test_mlflow_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # it is in maintenance, and asks for that
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    fit(tmp_path, logger)
    found = logger.experiment.get_run(logger.run_id)
    assert set(found.data.metrics) >= EXPECTED
    history = logger.experiment.get_metric_history(logger.run_id, "cap/sparsity")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0.5), (4, 0.75)]
    for name in (SPARSITY, SALIENCY):
        files = logger.experiment.list_artifacts(logger.run_id, name)
        assert [Path(file.path).name for file in files] == ["step-00000000.png", "step-00000004.png"]


def test_wandb_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path)
    given: dict[str, list[Any]] = {}
    log = logger.experiment.log

    def keep(metrics: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in metrics.items():
            given.setdefault(name, []).append(value)
        log(metrics, *args, **kwargs)

    monkeypatch.setattr(logger.experiment, "log", keep)
    try:
        fit(tmp_path, logger)
    finally:
        wandb.finish()
    assert set(given) >= EXPECTED
    assert all(isinstance(image, wandb.Image) for images in given[SPARSITY] for image in images)
    assert [sum(histogram.histogram) for histogram in given[SALIENCY]] == [256, 128]


class Plain(Logger):
    """A user's own, which takes numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[str, float] = {}

    name, version = "plain", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.numbers.update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Not of interest."""


class Histograms(Plain):
    """Takes histograms and no images."""

    def __init__(self) -> None:
        super().__init__()
        self.experiment = self
        self.counts: list[int] = []

    def add_histogram_raw(self, name: str, num: int, bucket_counts: list[int], **others: Any) -> None:
        assert name == SALIENCY
        assert sum(bucket_counts) == num
        self.counts.append(num)


def test_units_have_a_saliency_too(tmp_path: Path) -> None:
    logger, cb = Histograms(), units({0: 0.3}, dirpath=str(tmp_path))
    trainer(tmp_path, cb, max_epochs=1, logger=logger).fit(Toy(), **loaders())
    assert logger.counts == [len(cb.masks["net.0.weight"]) + len(cb.masks["net.4.weight"]) - 2], "one of each must stay"


class Refusing(Plain):
    """Has the method, but its server is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def log_image(self, name: str, images: list[Any], step: int) -> None:
        self.asked += 1
        raise ConnectionError("no route to host")


def test_others_get_the_same_numbers(tmp_path: Path) -> None:
    own, files = Plain(), CSVLogger(tmp_path, name="csv")
    fit(tmp_path, own, files)
    columns = Path(files.log_dir, "metrics.csv").read_text().splitlines()[0].split(",")
    cap = {name for name in own.numbers if name.startswith("cap/")}
    assert cap >= EXPECTED
    assert cap == {name for name in columns if name.startswith("cap/")}


def test_a_picture_that_fails_is_told_once_and_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = Refusing()
    with caplog.at_level(logging.WARNING, "lightning_cap"):
        assert len(fit(tmp_path, broken)) == 2
    told = [record.getMessage() for record in caplog.records if "picture" in record.getMessage()]
    assert told == [
        "Refusing did not take a picture of the pruning event (ConnectionError: no route to host). It gets no more of them; the "
        "run goes on."
    ]
    assert broken.asked == 1
    assert broken.numbers["cap/sparsity"] == 0.75


def test_a_dry_run_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("lightning_cap.callbacks.loggers._log_pictures", refuse)
    trainer(tmp_path, callback(pruner=Magnitude()), fast_dev_run=True, logger=True).fit(Toy(), **loaders())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cap/sparsity", "cap/after/val acc.x-1"], ["cap/sparsity", "cap/after/val acc.x-1"]),
        (["cap/after/acc@5 (%)", "a[0]:b"], ["cap/after/acc_5 ___", "a_0__b"]),
        (["a@1", "a%1", "a_1"], ["a_1", "a_1-2", "a_1-3"]),
        (["cap/after/val", "cap/after/val/acc"], ["cap/after/val_", "cap/after/val/acc"]),
        (["a//b", "a/../b", "/c", "d/"], ["a/_/b", "a/_/b-2", "_/c", "d/_"]),
        (["x" * 300], ["x" * 250]),
    ],
)
def test_names_that_a_logger_refuses(names: list[str], expected: list[str]) -> None:
    assert accepted({name: float(i) for i, name in enumerate(names)}) == {
        name: float(i) for i, name in enumerate(expected)
    }


def test_odd_names_reach_mlflows_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    class Odd(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", 0.5, logger=False)
            self.log("val/acc@1 (%)", 0.5, logger=False)
            self.log("val//loss", torch.tensor(0.25), logger=False)

    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    cb = callback({0: 0.5}, pruner=Magnitude(), dirpath=str(tmp_path / "pruned"))
    trainer(tmp_path, cb, max_epochs=1, logger=logger).fit(Odd(), **loaders())
    names = {name for name in logger.experiment.get_run(logger.run_id).data.metrics if name.startswith("cap/after")}
    assert names == {"cap/after/val_", "cap/after/val/acc_1 ___", "cap/after/val/_/loss"}
