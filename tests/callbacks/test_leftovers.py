"""What is refused leaves no folder of logs behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_cap.errors import ConfigError, TargetError
from tests.support.toy import Toy, callback, loaders, trainer


def make(kind: str, folder: Path) -> Logger:
    if kind == "csv":
        return CSVLogger(folder, name="toy")
    pytest.importorskip("tensorboard")
    return TensorBoardLogger(folder, name="toy")


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
@pytest.mark.parametrize("setting", [{"include": ["nothing"]}, {"save_sparsities": [0.9]}], ids=str)
def test_no_folder_of_what_is_refused(tmp_path: Path, kind: str, setting: dict[str, list[str]]) -> None:
    with pytest.raises((TargetError, ConfigError)):
        trainer(tmp_path, callback(**setting), logger=make(kind, tmp_path / "runs")).fit(Toy(), **loaders())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["csv", "tensorboard"])
def test_other_runs_and_other_files_stay(tmp_path: Path, kind: str) -> None:
    logs = tmp_path / "runs"
    trainer(tmp_path, callback({0: 0.5}), logger=make(kind, logs), max_epochs=1).fit(Toy(), **loaders())
    before = {str(path) for path in tmp_path.rglob("*")}
    wrong = callback(include=["nothing"])
    with pytest.raises(TargetError):
        trainer(tmp_path, wrong, logger=make(kind, logs)).fit(Toy(), **loaders())
    assert {str(path) for path in tmp_path.rglob("*")} == before
    (logs / "toy/version_1").mkdir()
    (logs / "toy/version_1/hparams.yaml").touch()
    os.utime(logs / "toy/version_1/hparams.yaml", (0, 0))
    logger = make(kind, logs)
    logger._version = 1  # type: ignore[attr-defined]
    with pytest.raises(TargetError):
        trainer(tmp_path, wrong, logger=logger).fit(Toy(), **loaders())
    assert (logs / "toy/version_1/hparams.yaml").exists()


def test_files_of_the_users_own_and_a_machine_without_homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user whom the system does not know
    logger = CSVLogger(tmp_path / "runs", name="toy")
    cb = callback(include=["nothing"])
    Path(logger.log_dir).mkdir(parents=True)
    own = Path(logger.log_dir, "config.yaml")
    own.write_text("mine")
    with pytest.raises(TargetError):
        trainer(tmp_path, cb, logger=logger).fit(Toy(), **loaders())
    assert own.read_text() == "mine"
