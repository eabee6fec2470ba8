"""Drop and grow inside a Lightning run (RigL, GraNet)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import lightning_cap.callbacks.pruning as callback_module
from lightning_cap.pruners import DropAndGrow
from lightning_cap.schedules import OneShot, PolynomialSchedule, RepeatedSchedule
from tests.support.regrowing import fit, rigl
from tests.support.stopping import averaging
from tests.support.toy import TARGET, Toy, callback, loaders, trainer, zeros

pytestmark = pytest.mark.usefixtures("seeded")


def test_weights_are_exchanged_within_one_cycle(tmp_path: Path) -> None:
    module, cb, watch = fit(tmp_path, RepeatedSchedule(0.75, end_epoch=4), rigl())
    assert [int((~mask).sum()) for mask in watch.masks] == [192] * 6
    new = [int((b & ~a).sum()) for a, b in zip(watch.masks, watch.masks[1:], strict=False)]
    assert all(new[:3]), "weights come back at every event"
    assert new[4] == 0, "after the end nothing moves"
    assert not watch.weights[1][watch.masks[1] & ~watch.masks[0]].any(), "at zero"
    assert int((cb.masks[TARGET] == 0).sum()) == 192
    assert zeros(module)[~cb.masks[TARGET]].all()
    assert [(record.goal, record.epochs) for record in cb.history] == [(0.0, 0), (0.75, 6)]
    assert [p.name for p in (tmp_path / "out").glob("*.ckpt")] == ["sparsity=0.75.ckpt"]
    assert all(b < a for a, b in zip(watch.lr[:-1], watch.lr[1:-1], strict=False)), "one decay over the whole cycle"
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert [e["epoch"] for e in events] == [0, 1, 2, 3, 4]
    assert ["val_acc" in e["after"] for e in events] == [True] + [False] * 4
    assert [e["samples"] for e in events] == [0, 4, 4, 4, 4]
    assert [e["grown_back"] for e in events] == [0, *new[:4]]


def test_exchanged_share_falls_by_a_cosine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []
    monkeypatch.setattr(DropAndGrow, "begin_event", lambda self, done: heard.append(done))
    fit(tmp_path, RepeatedSchedule(0.75, end_epoch=3), rigl())
    assert heard == [0.0, 0.25, 0.5, 0.75]


def test_a_rising_sparsity_is_granet(tmp_path: Path) -> None:
    _, cb, watch = fit(tmp_path, PolynomialSchedule(0.75, 0, 4, power=1), rigl(drop_fraction=0.5))
    counts = [int((~mask).sum()) for mask in watch.masks]
    assert counts == [0, 48, 96, 144, 192, 192]
    assert any((b & ~a).any() for a, b in zip(watch.masks, watch.masks[1:], strict=False))
    assert [record.goal for record in cb.history] == pytest.approx([0.0, 0.1875, 0.375, 0.5625, 0.75])


def test_a_sparser_model_grows_to_the_goal(tmp_path: Path) -> None:
    module, cb = Toy(), callback(OneShot(0.5), pruner=rigl(), dirpath=str(tmp_path))
    with torch.no_grad():
        module.net[4].weight[:, 2:] = 0.0
    trainer(tmp_path, cb).fit(module, **loaders())
    assert int((~cb.masks[TARGET]).sum()) == 128


def test_averages_go_on_within_a_cycle(tmp_path: Path) -> None:
    ema = averaging()
    updates: list[int] = []

    class Count(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            updates.append(int(ema._average_model.n_averaged))

    fit(tmp_path, RepeatedSchedule(0.75), rigl(), ema, Count())
    assert updates == [4, 8, 12, 16, 20, 24]


def test_a_longer_second_fit_saves_again(tmp_path: Path) -> None:
    module, cb = Toy(), callback(RepeatedSchedule(0.75), pruner=rigl(), dirpath=str(tmp_path))
    t = trainer(tmp_path, cb, max_epochs=4)
    t.fit(module, **loaders())
    t.fit_loop.max_epochs = 8
    t.fit(module, **loaders())
    assert cb._state.done == [0, 1, 2, 3, 4, 5, 6]
    assert torch.load(tmp_path / "sparsity=0.75.ckpt", weights_only=True)["epoch"] == 7


def test_an_event_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the disk is gone")

    module, cb = Toy(), callback(RepeatedSchedule(0.75, start_epoch=1), pruner=rigl(), dirpath=str(tmp_path))

    class Break(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                self.before = pl_module.net[4].weight.detach().clone(), cb.masks[TARGET].clone()
                monkeypatch.setattr(callback_module.PruningEvent, "_put", broken)

    around = Break()
    with pytest.raises(RuntimeError, match="the disk is gone"):
        trainer(tmp_path, around, cb, max_epochs=6).fit(module, **loaders())
    assert torch.equal(module.net[4].weight, around.before[0])
    assert torch.equal(cb.masks[TARGET], around.before[1])
    assert cb._state.done == [1]
