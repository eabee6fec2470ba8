"""Whole runs in which weights come back: resumed, and on two processes."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_cap.pruners import Magnitude
from lightning_cap.schedules import RepeatedSchedule, SparsitySchedule
from tests.support.processes import as_by_torchrun
from tests.support.regrowing import ACDC, rigl
from tests.support.stopping import CrashError, StopAfter, assert_same
from tests.support.toy import TARGET, Toy, callback, loaders, trainer

pytestmark = pytest.mark.usefixtures("seeded")


RUNS: dict[str, tuple[SparsitySchedule, Any]] = {
    "acdc": (ACDC, Magnitude),
    "rigl": (RepeatedSchedule(0.75), rigl),
}


def go(folder: Path, kind: str, *, ckpt: str | None = None, seed: int = 11, stop: int | None = None) -> tuple[Toy, Any]:
    pl.seed_everything(seed, verbose=False)
    schedule, pruner = RUNS[kind]
    cb = callback(schedule, pruner=pruner(), dirpath=str(folder / "pruned"))
    saver = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    extra = [] if stop is None else [StopAfter(stop)]
    module = Toy()
    t = trainer(folder, cb, saver, *extra, max_epochs=6, enable_checkpointing=True)
    with contextlib.suppress(CrashError):
        t.fit(module, **loaders(), ckpt_path=ckpt)
    return module, cb


@pytest.mark.parametrize("kind", RUNS)
def test_resume_from_every_epoch_end(tmp_path: Path, kind: str) -> None:
    whole, cb = go(tmp_path / "whole", kind)
    for epoch in range(5):
        cut = tmp_path / f"cut{epoch}"
        go(cut, kind, stop=epoch + 1)
        resumed, again = go(cut, kind, ckpt=str(cut / f"epoch={epoch}.ckpt"), seed=99)
        assert_same(whole, resumed)
        assert torch.equal(cb.masks[TARGET], again.masks[TARGET])
        values = [[(record.goal, record.epochs, record.value) for record in c.history] for c in (cb, again)]
        assert values[0] == values[1]
        assert {p.name for p in (cut / "pruned").glob("*.ckpt")} == {
            p.name for p in (tmp_path / "whole/pruned").glob("*.ckpt")
        }


class Dump(pl.Callback):
    """Every rank writes its weights and masks at the end of each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        cb = next(c for c in trainer.callbacks if hasattr(c, "masks"))
        state = pl_module.net[4].weight.detach().clone(), cb.masks[TARGET].clone()
        torch.save(state, self.folder / f"{trainer.current_epoch}-{trainer.global_rank}.pt")


def fit_on_ranks(folder: Path, kind: str) -> None:
    schedule, pruner = RUNS[kind]
    cb = callback(schedule, pruner=pruner(), dirpath=str(folder / "out"))
    trainer(folder, cb, Dump(folder), max_epochs=6, devices=2, strategy="ddp").fit(Toy(), **loaders())


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("kind", RUNS)
def test_two_processes_go_together(tmp_path: Path, kind: str) -> None:
    as_by_torchrun(2, tmp_path, fit_on_ranks, tmp_path, kind)
    masks = []
    for epoch in range(6):
        (weight, mask), (other, other_mask) = (torch.load(tmp_path / f"{epoch}-{rank}.pt") for rank in range(2))
        assert torch.equal(weight, other)
        assert torch.equal(mask, other_mask)
        assert not weight[~mask].any()
        masks.append(mask)
    assert int((~masks[-1]).sum()) == 192
    assert any((later & ~earlier).any() for earlier, later in pairwise(masks)), "weights came back"
    assert (tmp_path / "out/sparsity=0.75.ckpt").exists()
