"""Runs on two and four real gloo processes on the CPU. The path of a pruner alone: `tests/fisher/test_sharding.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_cap.callbacks.state import pruned_units
from tests.support.ddp_run import Calibrated, assert_pruned_alike, ddp_run, written
from tests.support.processes import as_by_torchrun
from tests.support.toy import callback, cap, loaders, trainer

pytestmark = pytest.mark.xdist_group("processes")


def assert_same_event(folder: Path, world: int) -> None:
    """The event gave every rank what it gave on one process, up to rounding."""
    (one,) = written(folder, "event", 1)
    for other in written(folder, "event", world):
        assert torch.equal(one == 0, other == 0)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("m", [1, 3])
def test_an_event_does_not_depend_on_the_number_of_processes(tmp_path: Path, m: int) -> None:
    settings = {"num_gradients": 44, "samples_per_gradient": m}
    ddp_run(tmp_path, 1, **settings)
    as_by_torchrun(2, tmp_path, ddp_run, tmp_path, 2, False, None, **settings)
    assert_same_event(tmp_path, 2)
    assert torch.equal(*written(tmp_path, "event", 2))
    assert_pruned_alike(tmp_path)
    state = torch.load(tmp_path / "out/sparsity=0.75-v1.ckpt", weights_only=True)  # of the second run into that folder
    entry = next(v for k, v in state["callbacks"].items() if "CAPPruningCallback" in k)
    assert len(entry["rng"]) == 2


def test_units_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    ddp_run(tmp_path, 1, units=True, num_gradients=44)
    as_by_torchrun(2, tmp_path, ddp_run, tmp_path, 2, False, None, True, num_gradients=44)
    assert_same_event(tmp_path, 2)
    assert torch.equal(*written(tmp_path, "end", 2))
    one, two = (
        pruned_units(torch.load(tmp_path / f"out/flops=0.50{suffix}.ckpt", weights_only=True)["callbacks"])
        for suffix in ("", "-v1")  # the second is of the second run into that folder
    )
    assert one is not None
    assert two is not None
    assert str(one[0].state_dict()) == str(two[0].state_dict())
    assert all(torch.equal(mask, two[1][name]) for name, mask in one[1].items())


def test_an_error_on_one_process_ends_all_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="the disk of rank 1 is gone") as caught:
        as_by_torchrun(2, tmp_path, ddp_run, tmp_path, 2, fail=True)
    assert not isinstance(caught.value, TimeoutError)


class Unsynced(Calibrated):
    """Logs a metric that differs between the ranks, as without ``sync_dist``."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        sign = 1 if self.global_rank == 0 else -1
        self.log("score", float(sign * self.current_epoch))


def fit_unsynced(folder: Path) -> None:
    cb = callback({0: 0.5}, dirpath=str(folder / "out"), save="both", monitor="score", evaluate=False)
    trainer(folder, cb, devices=2, strategy="ddp", max_epochs=3).fit(Unsynced(), **loaders())


def test_ranks_decide_together_what_is_best(tmp_path: Path) -> None:
    as_by_torchrun(2, tmp_path, fit_unsynced, tmp_path)
    assert torch.load(tmp_path / "out/sparsity=0.50-best.ckpt", weights_only=True)["epoch"] == 2


STRATEGIES: dict[str, dict[str, Any]] = {
    "find_unused": {"strategy": DDPStrategy(find_unused_parameters=True)},
    "bucket view": {"strategy": DDPStrategy(gradient_as_bucket_view=True)},
    "static graph": {"strategy": DDPStrategy(static_graph=True)},
    "accumulation": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "clipped": {"gradient_clip_val": 0.5},
}


@pytest.mark.parametrize("options", STRATEGIES.values(), ids=list(STRATEGIES))
def test_strategies_and_settings(tmp_path: Path, options: dict[str, Any]) -> None:
    as_by_torchrun(2, tmp_path, ddp_run, tmp_path, 2, options=options, num_gradients=20)
    assert_pruned_alike(tmp_path)


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    ddp_run(tmp_path, 1, num_gradients=44)
    as_by_torchrun(4, tmp_path, ddp_run, tmp_path, 4, num_gradients=44)
    assert_same_event(tmp_path, 4)


class Loaded(pl.Callback):
    """Writes weights and masks as they are when a resumed fit begins to train."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        cb = next(c for c in trainer.callbacks if hasattr(c, "masks"))
        state = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        torch.save((state, dict(cb.masks)), self.folder / f"loaded-{trainer.world_size}-{trainer.global_rank}.pt")


def fit_from(folder: Path, devices: int, checkpoint: str) -> None:
    cb = callback({0: 0.5, 1: 0.75}, pruner=cap(num_gradients=20), dirpath=str(folder / "again"))
    strategy = "ddp" if devices > 1 else "auto"
    t = trainer(folder, cb, Loaded(folder), devices=devices, strategy=strategy, max_epochs=2)
    t.fit(Calibrated(), **loaders(), ckpt_path=checkpoint)


@pytest.mark.filterwarnings("ignore:The checkpoint holds the random state")
@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_resume_with_another_number_of_processes(tmp_path: Path, devices: int) -> None:
    as_by_torchrun(2, tmp_path, ddp_run, tmp_path, 2, num_gradients=20)
    saved = tmp_path / "out/sparsity=0.50.ckpt"
    weights = torch.load(saved, weights_only=True)["state_dict"]
    if devices == 1:
        fit_from(tmp_path, 1, str(saved))
    else:
        as_by_torchrun(devices, tmp_path, fit_from, tmp_path, devices, str(saved))
    for state, masks in written(tmp_path, "loaded", devices):
        for name, value in state.items():
            assert torch.equal(value, weights[name])
        for name, mask in masks.items():
            assert torch.equal(mask, weights[name] != 0)
    assert (tmp_path / "again/sparsity=0.75.ckpt").exists()
