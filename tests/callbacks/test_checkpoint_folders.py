"""Checkpoints that are folders, without processes: what is left of one, and what one process reads out of it."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from lightning_cap.callbacks.checkpoint_folders import WholeFolders, read_folder
from lightning_cap.callbacks.cycle import save_missing
from lightning_cap.errors import DataError
from lightning_cap.trainer.checkpoints import check_checkpoint
from lightning_cap.trainer.run_records import CycleRecord


class Alone:
    """A strategy of one process that writes folders as Lightning's does."""

    is_global_zero = True

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = list(optimizers)
        self.fails = False
        self._save_distributed_checkpoint = True  # as Lightning calls it

    def broadcast(self, value: Any) -> Any:
        return value

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any = None) -> None:
        self.path = path
        if not self._save_distributed_checkpoint:
            return
        states = {f"optimizer_{i}": state for i, state in enumerate(checkpoint.pop("optimizer_states"))}
        dcp.save({"state_dict": checkpoint.pop("state_dict"), **states}, checkpoint_id=path, no_dist=True)
        if self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")
        torch.save(checkpoint, Path(path) / "meta.pt")


def make(step: bool = True) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizers = [torch.optim.AdamW(model[0].parameters()), torch.optim.SGD(model[1].parameters(), 0.1, momentum=0.9)]
    if step:
        model(torch.ones(1, 3)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    return model, optimizers


def checkpoint(model: nn.Module, optimizers: list[Any], step: int) -> dict[str, Any]:
    return {
        "state_dict": get_model_state_dict(model),
        "optimizer_states": [get_optimizer_state_dict(model, optimizer) for optimizer in optimizers],
        "global_step": step,
        "pytorch-lightning_version": "2.5.0",
        "lr_schedulers": [],
        "loops": {},
    }


def test_a_folder_is_read_by_one_process(tmp_path: Path) -> None:
    model, optimizers = make()
    WholeFolders(Alone(*optimizers))(checkpoint(model, optimizers, 1), tmp_path / "a.ckpt")  # type: ignore[arg-type]
    check_checkpoint(tmp_path / "a.ckpt", resumes=True, folders=True)
    held = read_folder(tmp_path / "a.ckpt")
    assert held["global_step"] == 1
    other, fresh = make(step=False)
    other.load_state_dict(held["state_dict"])
    for optimizer, own, state in zip(fresh, optimizers, held["optimizer_states"], strict=True):
        optimizer.load_state_dict(state)
        for moments, others in zip(own.state.values(), optimizer.state.values(), strict=True):
            assert moments.keys() == others.keys()
            assert all(torch.equal(moments[name], others[name]) for name in moments)
        assert own.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    model, optimizers = make()
    strategy: Any = Alone(*optimizers)
    save = WholeFolders(strategy)
    save(checkpoint(model, optimizers, 1), tmp_path / "a.ckpt")
    strategy.fails = True
    with pytest.raises(OSError, match="No space left"):
        save(checkpoint(model, optimizers, 2), tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert read_folder(tmp_path / "a.ckpt")["global_step"] == 1
    strategy.fails = False
    save(checkpoint(model, optimizers, 3), tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert read_folder(tmp_path / "a.ckpt")["global_step"] == 3


def test_saving_before_the_first_step_counts_none(tmp_path: Path) -> None:
    """torch makes the states of optimizers by a step of zeros."""
    model, optimizers = make(step=False)
    saved = checkpoint(model, optimizers, 0)
    assert {int(state["step"]) for state in optimizers[0].state.values()} == {1}
    WholeFolders(Alone(*optimizers))(saved, tmp_path / "a.ckpt")  # type: ignore[arg-type]
    assert {int(state["step"]) for state in optimizers[0].state.values()} == {0}, "the run that goes on"
    states = read_folder(tmp_path / "a.ckpt")["optimizer_states"][0]["state"]
    assert {int(state["step"]) for state in states.values()} == {0}, "the run that is resumed"


def test_single_files_are_left_to_lightning(tmp_path: Path) -> None:
    """Which may have another thread write them, later."""
    model, optimizers = make()
    strategy: Any = Alone(*optimizers)
    strategy._save_distributed_checkpoint = False
    WholeFolders(strategy)(checkpoint(model, optimizers, 1), tmp_path / "a.ckpt")
    assert strategy.path == str(tmp_path / "a.ckpt")


def test_a_folder_of_another_strategy_is_refused(tmp_path: Path) -> None:
    dcp.save({"model": {"weight": torch.ones(2)}}, checkpoint_id=tmp_path / "a.ckpt", no_dist=True)
    torch.save({}, tmp_path / "a.ckpt/meta.pt")
    with pytest.raises(DataError, match=r"it has no 'state_dict'.* ModelParallelStrategy"):
        read_folder(tmp_path / "a.ckpt")


def test_a_sharded_run_writes_no_weights_of_a_file(tmp_path: Path) -> None:
    """The file is of a run without shards, and its tensors do not fit into parts of them."""
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    record = CycleRecord(
        0.5, 1, None, 0.5, False, checkpoint=str(tmp_path / "a.ckpt"), weights=str(tmp_path / "a.safetensors")
    )
    targets: Any = SimpleNamespace(is_sharded=True)
    save_missing(pl.LightningModule(), targets, [record])
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
