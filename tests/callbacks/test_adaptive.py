"""Runs whose schedule finds the sparsities in the weights."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lightning_cap.callbacks.pruning import CAPPruningCallback
from lightning_cap.errors import GradientError
from lightning_cap.pruners import Magnitude
from lightning_cap.schedules import PQAdaptive
from lightning_cap.trainer.records import EventRecord
from lightning_cap.trainer.run_records import CycleRecord
from lightning_cap.utilities.records import read_records
from tests.support.pq import sparsity_after
from tests.support.stopping import CrashError, StopAfter, assert_same
from tests.support.toy import TARGET, Toy, loaders, trainer, zeros

EPOCHS = 6


class Watch(pl.Callback):
    """Keeps the weights before each event, and the learning rate after it."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights.append(dict(pl_module.named_parameters())[TARGET].detach().double().flatten().clone())

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def run(
    folder: Path, schedule: PQAdaptive, *extra: pl.Callback, ckpt: str | None = None, stop: int | None = None
) -> tuple[Toy, CAPPruningCallback, Watch]:
    pl.seed_everything(3, verbose=False)
    module, watch = Toy(), Watch()
    cb = CAPPruningCallback(schedule, Magnitude(), dirpath=str(folder / "pruned"))
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    stops = [] if stop is None else [StopAfter(stop)]
    t = trainer(folder, watch, cb, saver, *extra, *stops, max_epochs=EPOCHS, enable_checkpointing=True)
    try:
        t.fit(module, **loaders(), ckpt_path=ckpt)
    except CrashError:
        assert stop is not None
    return module, cb, watch


def test_a_run_prunes_as_its_weights_say(tmp_path: Path) -> None:
    module, cb, watch = run(tmp_path, PQAdaptive(1, 4, frequency=2, gamma=1.3))
    files = tmp_path / "pruned"
    events = read_records(files / "events.jsonl", EventRecord)
    assert [event.epoch for event in events] == [1, 3]
    for event in events:
        before = watch.weights[event.epoch]
        assert event.goal == sparsity_after(before[before != 0].tolist(), before.numel(), {"gamma": 1.3})
        assert event.sparsity == pytest.approx(event.goal, abs=1e-9)
    first, second = (event.goal for event in events)
    assert 0 < first < second == float(zeros(module).double().mean())
    assert [line.goal for line in read_records(files / "cycles.jsonl", CycleRecord)] == [0, first, second]
    assert [line.goal for line in cb.history] == [0, first, second]
    for goal, epoch in ((first, 3), (second, None)):
        saved = load_file(files / f"sparsity={goal:.6g}.safetensors")[TARGET.removeprefix("net.")]
        assert float((saved == 0).double().mean()) == goal
        if epoch is not None:
            assert torch.equal(saved.double().flatten(), watch.weights[epoch]), "what the next event saw"
    assert watch.rates[1] == watch.rates[3] == 1e-2, "each event begins a cycle of the learning rate"


@pytest.mark.parametrize("epoch", [0, 1, 2, 3])
def test_resumed_runs_end_alike(tmp_path: Path, epoch: int) -> None:
    schedule = PQAdaptive(1, 4, frequency=2)
    whole, cb, _ = run(tmp_path / "whole", schedule)
    run(tmp_path / "cut", schedule, stop=epoch + 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Other settings")
        resumed, again, _ = run(tmp_path / "cut", schedule, ckpt=str(tmp_path / "cut" / f"epoch={epoch}.ckpt"))
    assert_same(whole, resumed)
    tables = [[replace(r, checkpoint=Path(r.checkpoint).name, weights="") for r in c.history] for c in (cb, again)]
    assert tables[0] == tables[1]


def test_other_settings_are_told(tmp_path: Path) -> None:
    run(tmp_path, PQAdaptive(1, 4, frequency=2), stop=3)
    with pytest.warns(UserWarning, match=r"schedule\.gamma 1\.0 -> 1\.5"):
        run(tmp_path, PQAdaptive(1, 4, frequency=2, gamma=1.5), ckpt=str(tmp_path / "epoch=2.ckpt"))


def test_where_nothing_is_left_to_prune_the_cycle_goes_on(tmp_path: Path) -> None:
    module, cb, watch = run(tmp_path, PQAdaptive(1, 5, frequency=2, max_sparsity=0.1))
    assert float(zeros(module).double().mean()) == pytest.approx(0.1, abs=0.01)
    assert [(line.goal, line.epochs) for line in cb.history] == [(0.0, 1), (0.1, EPOCHS)], "what is trained on is saved"
    assert len(read_records(tmp_path / "pruned" / "events.jsonl", EventRecord)) == 1
    saved = load_file(tmp_path / "pruned" / "sparsity=0.10.safetensors")[TARGET.removeprefix("net.")]
    assert torch.equal(saved, dict(module.named_parameters())[TARGET].detach())
    assert watch.rates[3] == watch.rates[5] == 1e-2


def test_a_first_event_may_find_nothing(tmp_path: Path) -> None:
    class Alike(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            with torch.no_grad():
                dict(pl_module.named_parameters())[TARGET].fill_(0.1)

    module, cb, _ = run(tmp_path, PQAdaptive(0, 2, frequency=2), Alike())
    assert [event.epoch for event in read_records(tmp_path / "pruned" / "events.jsonl", EventRecord)] == [2]
    assert zeros(module).any()
    assert len(cb.history) == 2


def test_weights_that_are_not_finite_are_told(tmp_path: Path) -> None:
    class Break(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            with torch.no_grad():
                dict(pl_module.named_parameters())[TARGET][0, 0] = float("nan")

    with pytest.raises(GradientError, match="not finite"):
        run(tmp_path, PQAdaptive(1, 4), Break())


def test_fast_dev_run(tmp_path: Path) -> None:
    cb = CAPPruningCallback(PQAdaptive(1, 4), Magnitude())
    trainer(tmp_path, cb, fast_dev_run=True, max_epochs=None).fit(Toy(), **loaders())
    assert 0 < cb.masks.global_sparsity < 0.95
