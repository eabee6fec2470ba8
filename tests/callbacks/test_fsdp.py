"""Runs with `ModelParallelStrategy` and `fully_shard` (FSDP2) on two gloo processes on CPUs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

from lightning_cap.callbacks.checkpoint_folders import read_folder
from lightning_cap.errors import DataError, UnsupportedError
from lightning_cap.trainer.checkpoints import check_checkpoint
from lightning_cap.utilities import sharded
from tests.support.processes import as_by_torchrun
from tests.support.stopping import averaging
from tests.support.toy import TARGET, Toy, ToyData, callback, cap, loaders, loss, trainer

pytestmark = pytest.mark.xdist_group("processes")


class Sharded(Toy):
    """The toy, whose layers are sharded where the strategy shards; no batch norm, whose statistics each process has of its own."""

    def __init__(self, policy: bool = False) -> None:
        super().__init__(scheduler=False)
        self.net[1] = torch.nn.Identity()
        self.policy = policy

    def configure_model(self) -> None:
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        mesh = self.device_mesh["data_parallel"]
        settings = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if self.policy else {}
        for layer in (self.net[4], self.net):
            fully_shard(layer, mesh=mesh, **settings)

    def calibration_dataloader(self) -> Any:
        return DataLoader(ToyData(), batch_size=8)

    def calibration_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return loss(self, batch)


class Look(pl.Callback):
    """Writes down the whole weights right after the event at epoch 0, and what is sparse after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.zeros: list[int] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            torch.save(self._weights(pl_module), self.folder / f"event-{trainer.world_size}-{trainer.global_rank}.pt")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.zeros.append(int((self._weights(pl_module)[TARGET] == 0).sum()))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        ends = {"weights": self._weights(pl_module), "zeros": self.zeros}
        torch.save(ends, self.folder / f"end-{trainer.world_size}-{trainer.global_rank}.pt")

    def _weights(self, module: Any) -> dict[str, torch.Tensor]:
        sharded.reshard(module)
        return {name: sharded.whole(p.detach()).clone() for name, p in module.named_parameters()}


def fit(folder: Path, devices: int, how: str, policy: bool = False, **options: Any) -> None:
    pl.seed_everything(4, verbose=False)
    cb = callback({0: 0.5, 1: 0.75}, pruner=cap(num_gradients=24, samples_per_gradient=2), dirpath=str(folder / how))
    strategy: Any = {
        "one": "auto",
        "ddp": "ddp",
        "fsdp": ModelParallelStrategy(devices, 1, process_group_backend="gloo"),
        "tensor": ModelParallelStrategy(1, devices, process_group_backend="gloo"),
    }[how]
    t = trainer(
        folder, cb, Look(folder), devices=devices, strategy=strategy, max_epochs=2, use_distributed_sampler=True
    )
    t.fit(Sharded(policy), **loaders(), **options)


def test_an_event_gives_the_masks_of_ddp_and_of_one_process(tmp_path: Path) -> None:
    folders = {how: tmp_path / how for how in ("one", "ddp", "fsdp")}
    for how, folder in folders.items():
        folder.mkdir()
        devices = 1 if how == "one" else 2
        as_by_torchrun(devices, tmp_path, fit, folder, devices, how)
    wanted = torch.load(folders["one"] / "event-1-0.pt")[TARGET]
    assert int((wanted == 0).sum()) == 128
    for how in ("ddp", "fsdp"):
        for rank in range(2):
            found = torch.load(folders[how] / f"event-2-{rank}.pt")[TARGET]
            assert torch.equal(found == 0, wanted == 0)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    ends = [torch.load(folders["fsdp"] / f"end-2-{rank}.pt") for rank in range(2)]
    assert torch.equal(ends[0]["weights"][TARGET], ends[1]["weights"][TARGET])
    assert set(ends[0]["zeros"][:2]) == {128}
    assert ends[0]["zeros"][-1] == 192
    saved = load_file(folders["fsdp"] / "fsdp/sparsity=0.75.safetensors")
    for name, weight in ends[0]["weights"].items():
        assert torch.equal(saved[name.removeprefix("net.")], weight)


def resume(folder: Path) -> None:
    fit(folder, 2, "fsdp", ckpt_path=str(folder / "fsdp/sparsity=0.50.ckpt"))


def test_a_run_goes_on_from_a_distributed_checkpoint(tmp_path: Path) -> None:
    as_by_torchrun(2, tmp_path, fit, tmp_path, 2, "fsdp")
    uninterrupted = torch.load(tmp_path / "end-2-0.pt")["weights"]
    as_by_torchrun(2, tmp_path, resume, tmp_path)
    for name, weight in torch.load(tmp_path / "end-2-0.pt")["weights"].items():
        assert torch.equal(weight, uninterrupted[name])
    check_folder(tmp_path / "fsdp/sparsity=0.75.ckpt", uninterrupted)


def check_folder(path: Path, weights: dict[str, torch.Tensor]) -> None:
    """A process alone can read it, also by the command that the message names."""
    check_checkpoint(path, resumes=True, folders=True)
    held = read_folder(path)
    for name, weight in weights.items():
        assert torch.equal(held["state_dict"][name], weight)
        assert held["optimizer_states"][0]["state"][name]["exp_avg"].shape == weight.shape
    with pytest.raises(
        DataError, match=r"sharded checkpoint.* by python -m lightning.fabric.utilities.consolidate"
    ) as e:
        check_checkpoint(path)
    assert str(path) in str(e.value)
    file = path.with_name("one.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["consolidate", str(path), "--output_file", str(file)])
        runpy.run_module("lightning.fabric.utilities.consolidate_checkpoint", run_name="__main__")
    check_checkpoint(file)
    assert all(torch.equal(value, held["state_dict"][n]) for n, value in torch.load(file)["state_dict"].items())


def test_a_mixed_precision_policy_works(tmp_path: Path) -> None:
    as_by_torchrun(2, tmp_path, fit, tmp_path, 2, "fsdp", True)
    end = torch.load(tmp_path / "end-2-0.pt")
    assert end["weights"][TARGET].dtype == torch.float32
    assert end["zeros"] == [128, 128, 192, 192]


def fit_tensor_parallel(folder: Path) -> str:
    with pytest.raises(UnsupportedError) as caught:
        fit(folder, 2, "tensor")
    return str(caught.value)


def test_tensor_parallel_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for told in as_by_torchrun(2, tmp_path, fit_tensor_parallel, tmp_path):
        assert "tensor_parallel_size=2" in told
        assert "ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)" in told


def fit_with_averages(folder: Path) -> str:
    pl.seed_everything(4, verbose=False)
    strategy = ModelParallelStrategy(1, 1, process_group_backend="gloo")
    with pytest.raises(UnsupportedError) as caught:
        trainer(folder, callback({0: 0.5}), averaging(), strategy=strategy).fit(Sharded(), **loaders())
    return str(caught.value)


def fit_with_averages_alone(folder: Path) -> str:
    strategy = ModelParallelStrategy(1, 1, process_group_backend="gloo")
    with pytest.warns(UserWarning, match="doesn't support sharding"), pytest.raises(AssertionError) as caught:
        trainer(folder, averaging(), strategy=strategy).fit(Sharded(), **loaders())
    return str(caught.value)


def test_averages_of_shards_are_refused(tmp_path: Path) -> None:
    averaging()  # skips where this Lightning has none
    (told,) = as_by_torchrun(1, tmp_path, fit_with_averages, tmp_path)
    assert told == (
        "callbacks: EMAWeightAveraging does not average sharded weights (FSDP2): Lightning copies the whole model for it. Remove "
        "it, or use Trainer(strategy='ddp')."
    )
    (told,) = as_by_torchrun(1, tmp_path, fit_with_averages_alone, tmp_path)
    assert "does not support deepcopy" in told, "else it need not be refused any more"
