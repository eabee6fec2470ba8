"""Two real gloo processes on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from toy import Toy, ToyData, callback, cap, loaders, trainer

from lightning_cap.errors import CAPError


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


def run(folder: Path, devices: int, fail: bool = False, **kwargs: Any) -> None:
    pl.seed_everything(4, verbose=False)
    module = Calibrated()
    module.fail = fail
    cb = callback({0: 0.5, 1: 0.75}, pruner=cap(**kwargs), dirpath=str(folder / "out"))
    t = trainer(
        folder, cb, Dump(folder), devices=devices, strategy="ddp_spawn" if devices > 1 else "auto", max_epochs=2
    )
    t.fit(module, **loaders())


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
