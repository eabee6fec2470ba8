"""Dense and sparse phases in turn inside a Lightning run (AC/DC)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_cap.errors import PatternError
from lightning_cap.pruners import Magnitude, Pruner
from lightning_cap.schedules import AlternatingSchedule
from lightning_cap.sparsity.patterns import NofM
from tests.support.regrowing import ACDC, fit
from tests.support.stopping import averaging
from tests.support.toy import TARGET, Toy, callback, cap, loaders, trainer, zeros
from tests.support.watch import Watch

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("pruner", [Magnitude(), cap()], ids=["magnitude", "cap"])
def test_masks_are_lifted_and_imposed_anew(tmp_path: Path, pruner: Pruner) -> None:
    module, cb, watch = fit(tmp_path, ACDC, pruner)
    assert watch.sparsity[:4] == [0.0] * 4
    assert watch.sparsity[4:12] == [0.75] * 8
    assert max(watch.sparsity[12:16]) < 0.25, "what came back is trained"
    assert watch.sparsity[16:] == [0.75] * 8
    assert [int((~mask).sum()) for mask in watch.masks] == [0, 192, 192, 0, 192, 192]
    assert not watch.weights[3][~watch.masks[2]].any(), "weights come back from zero"
    assert cb.masks.global_sparsity == 0.75
    assert torch.equal(zeros(module), ~watch.masks[4])


def test_a_sparse_phase_prunes_the_dense_weights_anew(tmp_path: Path) -> None:
    class Tamper(pl.Callback):
        """Makes weights that the first sparse phase had pruned the largest. In front of the pruning callback."""

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 4:
                with torch.no_grad():
                    pl_module.net[4].weight[~watch.masks[2]] += 3.0

    watch, cb = Watch(), callback(ACDC, pruner=Magnitude(), dirpath=str(tmp_path))
    trainer(tmp_path, Tamper(), cb, watch, max_epochs=6).fit(Toy(), **loaders())
    assert not (watch.masks[4] & watch.masks[2]).any()
    assert int((~watch.masks[4]).sum()) == 192


def test_a_dense_phase_is_a_cycle_with_a_record_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, cb, watch = fit(tmp_path, ACDC, Magnitude())
    assert [(record.goal, record.epochs) for record in cb.history] == [(0.0, 4), (0.75, 6)]
    assert cb.history[0].sparsity < 0.2
    assert sorted(p.name for p in (tmp_path / "out").glob("*.ckpt")) == ["sparsity=0.00.ckpt", "sparsity=0.75.ckpt"]
    assert torch.load(tmp_path / "out/sparsity=0.75.ckpt", weights_only=True)["epoch"] == 5
    assert "dense" in capsys.readouterr().out
    top = [i for i, (a, b) in enumerate(zip(watch.lr[:-1], watch.lr[1:-1], strict=False)) if b > a]
    assert top == [2, 10, 14]  # the last step before each of the three events; the rate then begins anew
    events = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert [(e["epoch"], e["goal"], e["grown_back"]) for e in events] == [(1, 0.75, 0), (3, 0.0, 192), (4, 0.75, 0)]
    assert "val_acc" in events[1]["after"]


def test_phases_of_a_pattern(tmp_path: Path) -> None:
    schedule = AlternatingSchedule(0.5, 1, 2, 1)
    _, cb, watch = fit(tmp_path, schedule, cap(pattern=NofM(2, 4)))
    assert [int((~mask).sum()) for mask in watch.masks] == [0, 128, 128, 0, 128, 128]
    assert int(cb.masks[TARGET].view(-1, 4).sum(1).max()) == 2
    with pytest.raises(PatternError):
        fit(tmp_path, AlternatingSchedule(0.6, 1, 2, 1), cap(pattern=NofM(2, 4)))


def test_averages_follow_a_lift(tmp_path: Path) -> None:
    ema = averaging()
    seen: list[int] = []

    class Count(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(int((ema._average_model.module.net[4].weight == 0).sum()))

    fit(tmp_path, ACDC, Magnitude(), ema, Count())
    assert seen[:3] == [0, 192, 192]
    assert seen[3] < 50
    assert seen[4:] == [192, 192]


def test_lifting_is_split_into_no_steps(tmp_path: Path) -> None:
    _, _, watch = fit(tmp_path, ACDC, cap(), callback={"num_recomputations": 2})
    assert [int((~mask).sum()) for mask in watch.masks] == [0, 192, 192, 0, 192, 192]
