"""Runs on two and four real gloo processes on the CPU. The path of the pruner alone: `test_sharding.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_cap.errors import CAPError
from tests.support import ROOT
from tests.support.toy import Toy, ToyData, callback, cap, loaders, trainer


class Dump(pl.Callback):
    """Every rank writes what it has: weights and masks right after the event at epoch 0, and at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            self._write(trainer, pl_module, "event")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._write(trainer, pl_module, "end")

    def _write(self, trainer: Any, pl_module: Any, when: str) -> None:
        weight = pl_module.net[4].weight.detach().clone()
        torch.save(weight, self.folder / f"{when}-{trainer.world_size}-{trainer.global_rank}.pt")


class Calibrated(Toy):
    """Draws calibration samples with augmentation; rank 1 fails on request."""

    fail = False

    def calibration_dataloader(self) -> Any:
        return DataLoader(ToyData(), batch_size=8)

    def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.fail and self.global_rank == 1 and self.trainer.current_epoch == 1:
            raise ValueError("the disk of rank 1 is gone")
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def run(
    folder: Path,
    devices: int,
    fail: bool = False,
    options: dict[str, Any] | None = None,
    module: Any = None,
    **kwargs: Any,
) -> None:
    pl.seed_everything(4, verbose=False)
    module = module or Calibrated()
    module.fail = fail
    cb = callback({0: 0.5, 1: 0.75}, pruner=cap(**kwargs), dirpath=str(folder / "out"))
    settings = {
        "devices": devices,
        "strategy": "ddp_spawn" if devices > 1 else "auto",
        "max_epochs": 2,
        **(options or {}),
    }
    trainer(folder, cb, Dump(folder), **settings).fit(module, **loaders())


@pytest.mark.parametrize("m", [1, 3])
def test_an_event_does_not_depend_on_the_number_of_processes(tmp_path: Path, m: int) -> None:
    for devices in (1, 2):
        run(tmp_path, devices, num_gradients=44, samples_per_gradient=m)
    one = torch.load(tmp_path / "event-1-0.pt")
    both = [torch.load(tmp_path / f"event-2-{r}.pt") for r in range(2)]
    assert torch.equal(both[0], both[1])
    assert torch.equal(one == 0, both[0] == 0)
    torch.testing.assert_close(one, both[0], rtol=1e-5, atol=1e-7)
    ends = [torch.load(tmp_path / f"end-2-{r}.pt") for r in range(2)]
    assert torch.equal(*ends)
    assert float((ends[0] == 0).float().mean()) == 0.75
    state = torch.load(tmp_path / "out/sparsity=0.75.ckpt", weights_only=True)
    entry = next(v for k, v in state["callbacks"].items() if "CAPPruningCallback" in k)
    assert len(entry["rng"]) == 2


def test_an_error_on_one_process_ends_all_with_its_message(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="the disk of rank 1 is gone") as caught:
        run(tmp_path, 2, fail=True)
    assert not isinstance(caught.value, TimeoutError)
    assert issubclass(CAPError, Exception)


class Unsynced(Calibrated):
    """Logs a metric that differs between the ranks, as without ``sync_dist``."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        sign = 1 if self.global_rank == 0 else -1
        self.log("score", float(sign * self.current_epoch))


def test_ranks_decide_together_what_is_best(tmp_path: Path) -> None:
    cb = callback({0: 0.5}, dirpath=str(tmp_path / "out"), save="both", monitor="score", evaluate=False)
    t = trainer(tmp_path, cb, devices=2, strategy="ddp_spawn", max_epochs=3)
    t.fit(Unsynced(), **loaders())
    assert torch.load(tmp_path / "out/sparsity=0.50-best.ckpt", weights_only=True)["epoch"] == 2


STRATEGIES: dict[str, dict[str, Any]] = {
    "find_unused": {"strategy": DDPStrategy(start_method="spawn", find_unused_parameters=True)},
    "bucket view": {"strategy": DDPStrategy(start_method="spawn", gradient_as_bucket_view=True)},
    "static graph": {"strategy": DDPStrategy(start_method="spawn", static_graph=True)},
    "accumulation": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "clipped": {"gradient_clip_val": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", STRATEGIES.values(), ids=list(STRATEGIES))
def test_strategies_and_settings(tmp_path: Path, options: dict[str, Any]) -> None:
    run(tmp_path, 2, options=options, num_gradients=20)
    ends = [torch.load(tmp_path / f"end-2-{r}.pt") for r in range(2)]
    assert torch.equal(*ends)
    assert float((ends[0] == 0).float().mean()) == 0.75


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    for devices in (1, 4):
        run(tmp_path, devices, num_gradients=44)
    one = torch.load(tmp_path / "event-1-0.pt")
    for r in range(4):
        other = torch.load(tmp_path / f"event-4-{r}.pt")
        assert torch.equal(one == 0, other == 0)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


_SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from tests.callbacks import test_ddp
if __name__ == "__main__":
    test_ddp.run(Path(sys.argv[1]), 2, options={"strategy": sys.argv[3]}, num_gradients=20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork", "torchrun"])
def test_start_methods(tmp_path: Path, strategy: str) -> None:
    if strategy == "ddp_fork" and not hasattr(os, "fork"):
        pytest.skip("no fork here")
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if strategy == "torchrun" else [
        sys.executable
    ]  # fmt: skip
    name = "ddp" if strategy == "torchrun" else strategy
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*start, str(script), str(tmp_path), str(ROOT), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = [torch.load(tmp_path / f"end-2-{r}.pt") for r in range(2)]
    assert torch.equal(*ends)
    assert float((ends[0] == 0).float().mean()) == 0.75


class Loaded(pl.Callback):
    """Writes weights and masks as they are when a resumed fit begins to train."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        cb = next(c for c in trainer.callbacks if hasattr(c, "masks"))
        state = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        torch.save((state, dict(cb.masks)), f"{self.file}-{trainer.world_size}-{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:The checkpoint holds the random state")
@pytest.mark.parametrize("devices", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_resume_with_another_number_of_processes(tmp_path: Path, devices: int) -> None:
    run(tmp_path, 2, num_gradients=20)
    saved = tmp_path / "out/sparsity=0.50.ckpt"
    weights = torch.load(saved, weights_only=True)["state_dict"]
    cb = callback({0: 0.5, 1: 0.75}, pruner=cap(num_gradients=20), dirpath=str(tmp_path / "again"))
    t = trainer(
        tmp_path,
        cb,
        Loaded(tmp_path / "loaded"),
        devices=devices,
        strategy="ddp_spawn" if devices > 1 else "auto",
        max_epochs=2,
    )
    t.fit(Calibrated(), **loaders(), ckpt_path=str(saved))
    for r in range(devices):
        state, masks = torch.load(tmp_path / f"loaded-{devices}-{r}.pt")
        for name, value in state.items():
            assert torch.equal(value, weights[name])
        for name, mask in masks.items():
            assert torch.equal(mask, weights[name] != 0)
    assert (tmp_path / "again/sparsity=0.75.ckpt").exists()
