"""What a cycle leaves behind: checkpoints, plain weights, rows of the table."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from lightning_cap.callbacks.cycle import Cycle, monitored
from lightning_cap.export.records import ExportRecord
from lightning_cap.trainer.records import EventRecord
from lightning_cap.utilities.records import read_records
from tests.support.toy import Toy, ToyData, callback, cap, loaders, trainer

pytestmark = pytest.mark.usefixtures("seeded")


def test_checkpoints_table_and_plain_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cb = callback(dirpath=str(tmp_path / "out"))
    module = Toy()
    trainer(tmp_path, cb).fit(module, **loaders())
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    stems = ("sparsity=0.50", "sparsity=0.75")
    assert names == [
        *("cycles.jsonl", "events.jsonl", "exports.jsonl", "run.jsonl"),
        *(f"{stem}.{end}" for stem in stems for end in ("ckpt", "safetensors")),
    ]
    for stem, sparsity in zip(stems, (0.5, 0.75), strict=True):
        plain = load_file(tmp_path / "out" / f"{stem}.safetensors")
        fresh = Toy().net
        fresh.load_state_dict(plain)  # strict, no prefix
        assert (fresh[4].weight == 0).float().mean() == sparsity
        saved = torch.load(tmp_path / "out" / f"{stem}.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(saved["net.4.weight"], fresh[4].weight)
    events = read_records(tmp_path / "out" / "events.jsonl", EventRecord)
    assert [(e.epoch, e.goal) for e in events] == [(1, 0.5), (2, 0.75)]
    assert events[1].sparsities == {"net.4.weight": 0.75}
    assert (events[0].unit, events[0].samples) == ("gradients", 48)
    assert {"val_acc", "val_loss"} == events[0].before.keys() == events[0].after.keys()
    assert events[0].seconds.keys() == {"plan", "collect", "solve", "apply"}
    exports = read_records(tmp_path / "out" / "exports.jsonl", ExportRecord)
    assert [(e.path, e.goal, e.sparsity) for e in exports] == [
        ("sparsity=0.50.safetensors", 0.5, 0.5),
        ("sparsity=0.75.safetensors", 0.75, 0.75),
    ]
    assert all(e.bytes == (tmp_path / "out" / e.path).stat().st_size for e in exports)
    assert [record.goal for record in cb.history] == [0.0, 0.5, 0.75]
    assert cb.history[-1].value == pytest.approx(float(module.trainer.callback_metrics["val_acc"]))
    printed = capsys.readouterr().out
    assert "dense" in printed
    assert "75.00 %" in printed
    assert "sparsity=0.75.ckpt" in printed


def test_best_of_cycle_is_saved_when_asked(tmp_path: Path) -> None:
    class Scripted(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("score", [0.1, 0.9, 0.2, 0.3, 0.8, 0.5][self.current_epoch])

    cb = callback({0: 0.5, 3: 0.75}, dirpath=str(tmp_path), save="both", monitor="score", save_sparsities=[0.5, 0.75])
    trainer(tmp_path, cb, max_epochs=6).fit(Scripted(), **loaders())
    best = {record.goal: record for record in cb.history if record.best}
    last = {record.goal: record for record in cb.history if not record.best}
    assert [best[s].epochs for s in (0.5, 0.75)] == [2, 5]
    assert [last[s].epochs for s in (0.5, 0.75)] == [3, 6]
    for name in ("sparsity=0.50-best", "sparsity=0.50", "sparsity=0.75-best", "sparsity=0.75"):
        epoch = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["epoch"]
        assert epoch + 1 == {record.checkpoint: record.epochs for record in cb.history}[str(tmp_path / f"{name}.ckpt")]


def test_only_requested_sparsities_are_saved(tmp_path: Path) -> None:
    cb = callback({1: 0.3, 2: 0.5, 3: 0.75}, dirpath=str(tmp_path), save_sparsities=[0.3, 0.75])
    trainer(tmp_path, cb).fit(Toy(), **loaders())
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["sparsity=0.30.ckpt", "sparsity=0.75.ckpt"]


def test_model_checkpoint_can_name_the_sparsity(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}-{sparsity:.2f}", save_top_k=-1)
    trainer(tmp_path, callback(), saver, enable_checkpointing=True).fit(Toy(), **loaders())
    assert (tmp_path / "epoch=3-sparsity=0.75.ckpt").exists()


def test_evaluation_around_an_event_can_be_left_out(tmp_path: Path) -> None:
    calls = []

    class Counts(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            calls.append(self.current_epoch)
            super().validation_step(batch, batch_idx)

    cb = callback(evaluate=False)
    trainer(tmp_path, cb).fit(Counts(), **loaders())
    assert len(calls) == 4 * 2
    assert cb.history[0].value is not None  # from the last validation before the first event


def test_training_without_validation(tmp_path: Path) -> None:
    cb = callback()
    trainer(tmp_path, cb).fit(Toy(), DataLoader(ToyData(), batch_size=16, shuffle=True))
    assert [record.value for record in cb.history] == [None, None, None]


def test_early_stop_still_saves_the_last_cycle(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    cb = callback({1: 0.5}, dirpath=str(tmp_path))
    trainer(tmp_path, cb, Stop(), max_epochs=10).fit(Toy(), **loaders())
    assert (tmp_path / "sparsity=0.50.ckpt").exists()


def test_the_table_and_the_cycle_survive_a_checkpoint(tmp_path: Path) -> None:
    cb = callback(dirpath=str(tmp_path))
    trainer(tmp_path, cb).fit(Toy(), **loaders())
    cb.history[0] = replace(cb.history[0], value=math.nan)
    torch.save(cb.state_dict(), tmp_path / "state.pt")
    again = callback(dirpath=str(tmp_path))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.history[1:] == cb.history[1:]
    assert math.isnan(again.history[0].value or 0.0)
    assert again._state.cycle == cb._state.cycle == Cycle(0.75, saved=True, begun=2)


def test_a_cycle_knows_its_best_value() -> None:
    cycle = Cycle(0.5)
    values = [None, math.nan, 0.5, 0.4, 0.5, 0.6]
    assert [cycle.improves(value, "max") for value in values] == [False, False, True, False, False, True]
    assert cycle.best == 0.6
    assert [cycle.improves(value, "min") for value in values] == [False, False, True, True, False, False]
    assert cycle.best == 0.4


def test_plain_weights_that_are_missing_are_written_on_resuming(tmp_path: Path) -> None:
    """As after a kill between the two files, or a full disk."""
    cb = callback({0: 0.5, 1: 0.75}, dirpath=str(tmp_path), pruner=cap(num_gradients=8))
    trainer(tmp_path, cb, max_epochs=2).fit(Toy(), **loaders())
    wanted = {path: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert len(wanted) == 2
    for path in wanted:
        path.unlink()
    again, module = callback({0: 0.5, 1: 0.75}, dirpath=str(tmp_path), pruner=cap(num_gradients=8)), Toy()
    t = trainer(tmp_path, again, max_epochs=2)
    t.fit(module, **loaders(), ckpt_path=str(tmp_path / "sparsity=0.75.ckpt"))
    for path, weights in wanted.items():
        found = load_file(path)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert float((module.net[4].weight == 0).float().mean()) == 0.75


def test_a_checkpoint_is_written_after_the_plain_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that its cycle is saved: a kill in between must leave none that says so."""

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", killed)
    with pytest.raises(Killed):
        trainer(tmp_path, callback({0: 0.5}, dirpath=str(tmp_path)), max_epochs=1).fit(Toy(), **loaders())
    assert (tmp_path / "sparsity=0.50.safetensors").exists()


def test_a_model_that_is_sparse_already_is_not_called_dense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Toy()
    with torch.no_grad():
        module.net[4].weight[:4] = 0
    cb = callback({1: 0.5}, dirpath=str(tmp_path))
    trainer(tmp_path, cb, max_epochs=2).fit(module, **loaders())
    printed = capsys.readouterr().out
    assert "dense" not in printed
    assert "start" in printed
    assert [record.epochs for record in cb.history] == [1, 2]
    assert "val_acc" in printed


def test_the_validation_loss_stands_in_for_an_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Regression(Toy):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self(batch[0]).square().mean())
            self.log("val_loss_of_another_kind", 3.0)

    cb = callback({0: 0.5}, dirpath=str(tmp_path))
    trainer(tmp_path, cb, max_epochs=1).fit(Regression(), **loaders())
    assert all(record.value is not None for record in cb.history)
    assert "val_loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("logged", "name"),
    [
        (["val/loss", "val/acc5", "val/acc", "val_score"], "val/acc"),
        (["val_loss", "val_iou", "train_loss"], "val_iou"),  # the only one beside the loss
        (["val_loss", "val_iou", "val_dice"], "val_loss"),  # one of two is a guess
        (["train_loss", "score"], None),
    ],
)
def test_the_metric_of_the_table(logged: list[str], name: str | None) -> None:
    metrics = {one: float(i) for i, one in enumerate(logged)}
    assert monitored(metrics, None) == (name, None if name is None else metrics[name])
