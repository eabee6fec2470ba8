"""``run.jsonl`` and ``cycles.jsonl``."""

from __future__ import annotations

import os
import signal
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_cap.callbacks.run_log as run_log
from lightning_cap.errors import DataError
from lightning_cap.pruners import Magnitude
from lightning_cap.schedules import OneShot
from lightning_cap.trainer.run_records import CycleRecord, RunRecord
from lightning_cap.utilities.records import known_records, read_records
from tests.support.stopping import CrashError, StopAfter
from tests.support.toy import TARGET, Toy, callback, cap, loaders, trainer
from tests.support.unit_runs import units, weights

pytestmark = pytest.mark.usefixtures("seeded")


def runs(folder: Path) -> list[RunRecord]:
    return read_records(folder / "run.jsonl", RunRecord)


def cycles(folder: Path) -> list[CycleRecord]:
    return known_records(folder / "cycles.jsonl", CycleRecord)


class Look(pl.Callback):
    """What the files hold while a run goes on, at the end of each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.states: list[tuple[str, str | None]] = []
        self.lines: list[int] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.states.append((runs(self.folder)[-1].state, runs(self.folder)[-1].metric))
        self.lines.append(len(cycles(self.folder)))


def test_a_run_tells_what_it_is_and_how_far_it_came(tmp_path: Path) -> None:
    cb, look = callback({1: 0.5, 2: 0.75}, pruner=cap(damp=1e-4), dirpath=str(tmp_path)), Look(tmp_path)
    trainer(tmp_path, cb, look).fit(Toy(), **loaders())
    (run,) = runs(tmp_path)
    assert look.states == [("running", None), *[("running", "val_acc")] * 3]
    assert look.lines == [0, 2, 2, 3]  # before the first event, and the two goals
    assert run.state == "finished"
    assert datetime.fromisoformat(run.started) < datetime.fromisoformat(run.ended)
    assert run.started.endswith("+00:00")
    assert (run.epoch, run.max_epochs, run.counted, run.metric, run.mode) == (0, 4, "sparsity", "val_acc", "max")
    assert run.schedule == {"1": 0.5, "2": 0.75}
    assert (run.model, run.weights) == ("Sequential", sum(p.numel() for p in Toy().parameters()))
    assert [(layer.name, layer.shape, layer.dense) for layer in run.layers] == [
        ("net.0.weight", (16, 12), "first"), (TARGET, (16, 16), ""), ("net.6.weight", (4, 16), "last")
    ]  # fmt: skip
    assert [layer.flops for layer in run.layers] == [2 * 12 * 16, 2 * 16 * 16, 2 * 16 * 4]
    assert run.flops == 2 * (12 * 16 + 16 * 16 + 16 * 4)
    assert run.plan is not None
    assert run.plan.peak_bytes > 0
    assert run.settings["pruner"] == "CAP"
    assert run.settings["pruner.damp"] == "0.0001"
    assert run.settings["include"] == "None"
    assert run.environment["processes"] == "1"
    assert run.environment["torch"]
    assert cycles(tmp_path) == cb.history


def test_layers_whose_weights_are_computed_and_compiled_ones(tmp_path: Path) -> None:
    class Normed(Toy):
        def __init__(self) -> None:
            super().__init__()
            torch.nn.utils.parametrizations.weight_norm(self.net[0])
            self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]

    cb = callback({0: 0.5}, pruner=Magnitude(), dirpath=str(tmp_path), include=[TARGET])
    trainer(tmp_path, cb, max_epochs=1).fit(Normed(), **loaders())
    layers = {layer.name: (layer.shape, layer.dense) for layer in runs(tmp_path)[0].layers}
    assert layers == {
        "net.0.weight": ((16, 12), "parametrized by WeightNorm"),
        TARGET: ((16, 16), ""),
        "net.6.weight": ((4, 16), "not in include"),
    }


def test_less_of_a_loss_is_better(tmp_path: Path) -> None:
    cb = callback(
        {0: 0.5}, pruner=Magnitude(), dirpath=str(tmp_path / "a"), monitor="val_loss", mode="min", save="both"
    )
    trainer(tmp_path, cb, max_epochs=2).fit(Toy(), **loaders())
    (run,) = runs(tmp_path / "a")
    assert (run.metric, run.mode) == ("val_loss", "min")
    assert [(line.goal, line.best) for line in cycles(tmp_path / "a")] == [(0.0, False), (0.5, True), (0.5, False)]

    class LossAlone(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", 1.0)

    cb = callback({0: 0.5}, pruner=Magnitude(), dirpath=str(tmp_path / "b"))
    trainer(tmp_path, cb, max_epochs=1).fit(LossAlone(), **loaders())
    (run,) = runs(tmp_path / "b")
    assert (run.metric, run.mode) == ("val_loss", "min")


@pytest.mark.parametrize("how", [CrashError, KeyboardInterrupt, signal.SIGTERM], ids=str)
def test_a_run_that_is_stopped_says_so(tmp_path: Path, how: Any) -> None:
    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 2 and batch_idx == 1:
                if isinstance(how, int):
                    os.kill(os.getpid(), how)
                else:
                    raise how

    cb = callback({1: 0.5}, pruner=Magnitude(), dirpath=str(tmp_path))
    with pytest.raises((CrashError, SystemExit, BaseException)):
        trainer(tmp_path, cb, Stop()).fit(Toy(), **loaders())
    (run,) = runs(tmp_path)
    assert run.state == "stopped"
    assert run.ended
    assert [line.goal for line in cycles(tmp_path)] == [0.0]


def test_a_start_that_goes_on_is_another_record(tmp_path: Path) -> None:
    def fit(ckpt: str | None = None, *extra: pl.Callback) -> Any:
        cb = callback({1: 0.5, 2: 0.75, 3: 0.9}, pruner=Magnitude(), dirpath=str(tmp_path))
        trainer(tmp_path, *extra, cb).fit(Toy(), **loaders(), ckpt_path=ckpt)
        return cb

    with pytest.raises(CrashError):
        fit(None, StopAfter(3))
    assert [line.goal for line in cycles(tmp_path)] == [0.0, 0.5, 0.75]
    look = Look(tmp_path)
    cb = fit(str(tmp_path / "sparsity=0.50.ckpt"), look)
    assert [(run.state, run.epoch) for run in runs(tmp_path)] == [("stopped", 0), ("finished", 2)]
    assert runs(tmp_path)[1].metric == "val_acc"
    assert look.lines == [2, 3]  # that of 75 % is to come again
    assert cycles(tmp_path) == cb.history
    assert not list(tmp_path.glob("*-v1*"))


def test_a_run_with_nothing_left_to_train_but_an_event(tmp_path: Path) -> None:
    """It was stopped in the event at the end of training."""
    schedule = OneShot(0.5, epoch=None)

    class Keep(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "end.ckpt")
            raise CrashError

    cut = callback(schedule, pruner=Magnitude(), dirpath=str(tmp_path))
    with pytest.raises(CrashError):
        trainer(tmp_path, Keep(), cut, max_epochs=2).fit(Toy(), **loaders())
    again = callback(schedule, pruner=Magnitude(), dirpath=str(tmp_path))
    trainer(tmp_path, again, max_epochs=2).fit(Toy(), **loaders(), ckpt_path=str(tmp_path / "end.ckpt"))
    assert [run.state for run in runs(tmp_path)] == ["stopped", "finished"]
    assert [line.goal for line in cycles(tmp_path)] == [0.0, 0.5]


def test_a_run_with_nothing_left_to_do_at_all(tmp_path: Path) -> None:
    """It was stopped between its last step and the line that says so; once it has said so, it says no more."""

    class Keep(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "end.ckpt")
            raise CrashError

    def fit(*extra: pl.Callback, ckpt: Path | None = None) -> None:
        cb = callback({1: 0.5}, pruner=Magnitude(), dirpath=str(tmp_path))
        trainer(tmp_path, cb, *extra, max_epochs=2).fit(Toy(), **loaders(), ckpt_path=ckpt)

    with pytest.raises(CrashError):
        fit(Keep())
    for _ in range(2):
        fit(ckpt=tmp_path / "end.ckpt")
        assert [run.state for run in runs(tmp_path)] == ["stopped", "finished"]
        assert [line.goal for line in cycles(tmp_path)] == [0.0, 0.5]


def test_two_callbacks_keep_apart(tmp_path: Path) -> None:
    first, second = units(dirpath=str(tmp_path)), weights(dirpath=str(tmp_path))
    trainer(tmp_path, first, second, max_epochs=6).fit(Toy(), **loaders())
    assert [(run.counted, run.state) for run in runs(tmp_path)] == [("flops", "finished"), ("sparsity", "finished")]
    lines = cycles(tmp_path)
    assert [line for line in lines if line.saving is not None] == first.history
    assert [line for line in lines if line.saving is None] == second.history


def test_a_dry_run_and_one_that_saves_nothing_write_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, callback(dirpath=str(tmp_path)), fast_dev_run=True).fit(Toy(), **loaders())
    trainer(tmp_path, callback(dirpath=str(tmp_path), save="none")).fit(Toy(), **loaders())
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("name", ["run.jsonl", "cycles.jsonl"])
def test_foreign_records_are_refused_before_training(tmp_path: Path, name: str) -> None:
    module = Toy()
    cb = callback({1: 0.5}, pruner=Magnitude(), dirpath=str(tmp_path))
    trainer(tmp_path, cb, max_epochs=2).fit(Toy(), **loaders())
    (tmp_path / name).write_text('{"record": "run", "version": 99}\n')
    again = callback({1: 0.5}, pruner=Magnitude(), dirpath=str(tmp_path))
    with pytest.raises(DataError, match=rf"{name}, line 1: .*"):
        trainer(tmp_path, again, max_epochs=3).fit(module, **loaders(), ckpt_path=str(tmp_path / "sparsity=0.50.ckpt"))
    assert module.batches == []


def test_that_a_run_was_stopped_is_told_though_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cb = callback({1: 0.5}, pruner=Magnitude(), dirpath=str(tmp_path))

    class Full(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            monkeypatch.setattr(run_log, "append_record", self.refuse)

        @staticmethod
        def refuse(*_: Any) -> None:
            raise OSError("disk full")

    with pytest.raises(CrashError):
        trainer(tmp_path, Full(), StopAfter(1), cb).fit(Toy(), **loaders())
    assert runs(tmp_path)[0].state == "running"
    assert "run.jsonl" in caplog.text
