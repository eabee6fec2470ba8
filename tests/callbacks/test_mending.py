"""Runs whose events heal weights and estimate the statistics of batch norm anew."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_cap.errors import ConfigError
from lightning_cap.pruners import CAPUnits, DropAndGrow, Magnitude
from lightning_cap.schedules import RepeatedSchedule
from lightning_cap.trainer.records import EventRecord
from lightning_cap.utilities.records import read_records
from tests.support.mending import Shift
from tests.support.stopping import CrashError, StopAfter, assert_same, averaging
from tests.support.toy import Toy, callback, loaders, trainer


def run(folder: Path, *extra: pl.Callback, ckpt: str | None = None, module: Toy | None = None, **kwargs: Any) -> Toy:
    """Three epochs with an event at the start of the second."""
    pl.seed_everything(4, verbose=False)
    module = Toy() if module is None else module
    given = {"schedule": {1: 0.75}, "pruner": Magnitude(), "dirpath": str(folder / "pruned"), "evaluate": False}
    cb = callback(**{**given, "heal": "layerwise", "recalibrate": True, **kwargs})
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    t = trainer(folder, cb, saver, *extra, max_epochs=3, enable_checkpointing=True)
    with contextlib.suppress(CrashError):
        t.fit(module, **loaders(), ckpt_path=ckpt)
    return module


class AfterEvent(pl.Callback):
    """Takes the module's state at the start of the first batch of the second epoch."""

    state: dict[str, torch.Tensor]
    modes: list[bool]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 0:
            self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}
            self.modes = [layer.training for layer in pl_module.net]


def event_of(folder: Path) -> EventRecord:
    (event,) = read_records(folder / "pruned" / "events.jsonl", EventRecord)
    return event


def test_an_event_heals_and_recalibrates_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = []
    for number, kwargs in enumerate(({}, {"heal": None, "recalibrate": False})):
        watch = AfterEvent()
        with caplog.at_level(logging.INFO):
            run(tmp_path / str(number), watch, **kwargs)
        seen.append(watch)
    event, plain = (event_of(tmp_path / str(number)) for number in range(2))
    assert (event.healed_samples, event.recalibration_samples) == (512, 1024)
    assert (plain.healed_samples, plain.recalibration_samples) == (0, 0)
    assert set(event.seconds) - set(plain.seconds) == {"heal", "recalibrate"}
    assert event.logged()["cap/healed_samples"] == 512
    assert "cap/healed_samples" not in plain.logged()
    assert "healed by 512 samples, batch norm by 1024" in caplog.text
    one, other = (watch.state for watch in seen)
    assert {name for name, value in one.items() if not torch.equal(value, other[name])} == {
        "net.4.weight", "net.4.bias", "net.1.running_mean", "net.1.running_var",
    }  # fmt: skip
    assert all(seen[0].modes)
    assert int((one["net.4.weight"] == 0).sum()) == 192
    assert event.stats["heal_output_error_after"] < event.stats["heal_output_error_before"]


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_is_exact(tmp_path: Path, epoch: int) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "cut", StopAfter(epoch + 1))
    resumed = run(tmp_path / "cut", ckpt=str(tmp_path / "cut" / f"epoch={epoch}.ckpt"))
    assert_same(whole, resumed)
    assert torch.equal(whole.net[1].running_var, resumed.net[1].running_var)


def test_a_failed_event_puts_biases_and_statistics_back(tmp_path: Path) -> None:
    class Fails(Toy):
        def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.armed and (self.net[4].weight == 0).any():  # in recalibration alone: `Shift` calls no model
                self.before = {name: value.clone() for name, value in self.state_dict().items()}
                raise RuntimeError("recalibration failed")
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        armed = True

    class Before(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}

    module, before = Fails(), Before()
    with pytest.raises(RuntimeError, match="recalibration failed"):
        run(tmp_path, before, module=module, heal=Shift())
    assert all(torch.equal(value, before.state[name]) for name, value in module.state_dict().items())
    assert not torch.equal(module.before["net.4.bias"], before.state["net.4.bias"])


@pytest.mark.parametrize("regrows", [False, True])
def test_averages_have_the_new_statistics(tmp_path: Path, regrows: bool) -> None:
    ema, watch = averaging(), AfterEvent()
    seen: list[torch.Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 2 - (not regrows) and batch_idx == 0:
                average = ema._average_model.module  # type: ignore[attr-defined]
                assert torch.equal(average.net[1].running_var, pl_module.net[1].running_var)
                seen.append(average.net[1].running_var.clone())

    regrowing = {"schedule": RepeatedSchedule(0.5), "pruner": DropAndGrow(num_gradients=4), "heal": None}
    run(tmp_path, ema, watch, Watch(), **(regrowing if regrows else {}))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"heal": "layerwise", "pruner": CAPUnits()}, "heal=LayerwiseHeal.*CAPUnits prunes units"),
        ({"heal": "layerwise", "pruner": DropAndGrow()}, "heal=LayerwiseHeal.*DropAndGrow brings weights back"),
    ],
)
def test_what_cannot_be_healed_is_refused_at_once(kwargs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        callback(**kwargs)


@pytest.mark.parametrize("kwargs", [{"heal": None}, {"recalibrate": False}], ids=["recalibrate", "heal"])
def test_calibration_data_that_cannot_be_read_is_refused_before_training(tmp_path: Path, kwargs: Any) -> None:
    class Odd(Toy):
        def calibration_dataloader(self) -> Any:
            return 3

    module = Odd()
    with pytest.raises(ConfigError, match="calibration_dataloader: it returned 3"):
        run(tmp_path, module=module, include=["net.4.weight"], **kwargs)
    assert module.batches == []


def test_without_batch_norm_it_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Plain(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net[1] = nn.Identity()

    with caplog.at_level(logging.INFO):
        run(tmp_path, module=Plain(), heal=None)
    assert caplog.text.count("recalibrate=True: Plain has no batch norm") == 1
    assert event_of(tmp_path).recalibration_samples == 0
