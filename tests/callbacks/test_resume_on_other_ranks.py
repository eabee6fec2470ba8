"""A run goes on with another number of processes: the same masks, and the same samples in every step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, WeightedRandomSampler

from lightning_cap.callbacks.resume import DataOrder, restore_random_state
from lightning_cap.utilities import distributed, rng, sharded
from tests.support.processes import as_by_torchrun
from tests.support.toy import CLASSES, FEATURES, Toy, ToyData, callback, trainer

SAMPLES = 16  # of a step, over all processes
ALIKE = 1e-6


class Plain(Toy):
    """Draws no random numbers, and no sample depends on the others of its batch."""

    def __init__(self) -> None:
        super().__init__("sgd")
        layers = [nn.Linear(FEATURES, 16), nn.LayerNorm(16), nn.ReLU(), nn.Identity(), nn.Linear(16, 16), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(16, CLASSES))

    def configure_model(self) -> None:
        """Sharded where the strategy shards."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for layer in (self.net[4], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Look(pl.Callback):
    """Writes the weights of each epoch's end, and at the end the masks and the samples of every step, of each rank."""

    def __init__(self, file: str) -> None:
        self.file, self.weights = file, {}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        sharded.reshard(pl_module)
        self.weights[trainer.current_epoch] = whole(pl_module.state_dict())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        masks = whole(trainer.callbacks[0].masks)
        torch.save((self.weights, masks, pl_module.batches), f"{self.file}-{trainer.global_rank}.pt")


def whole(tensors: Any) -> dict[str, torch.Tensor]:
    return {name: sharded.whole(tensor).clone() for name, tensor in tensors.items()}


def fit(folder: Path, name: str, how: str, ranks: int, ckpt: str | None = None, seed: int = 3) -> None:
    """Four epochs with events at 1 and 3. On one process the order is that which Lightning gives several by itself."""
    pl.seed_everything(seed, verbose=False)
    data, alone = ToyData(noise=0.0), how == "one" and ckpt is None
    sampler: Any = DistributedSampler(data, num_replicas=1, rank=0, seed=seed) if alone else None
    loader = DataLoader(data, SAMPLES // ranks, shuffle=sampler is None, sampler=sampler)
    cb = callback({1: 0.5, 3: 0.75}, dirpath=str(folder / name))
    saver = ModelCheckpoint(folder / name, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    strategy: Any = {
        "one": "auto",
        "ddp": "ddp",
        "fsdp": ModelParallelStrategy(ranks, 1, process_group_backend="gloo"),
        "fsdp in a file": ModelParallelStrategy(ranks, 1, False, process_group_backend="gloo"),
    }[how]
    look = Look(str(folder / name))
    t = trainer(folder, cb, look, saver, enable_checkpointing=True, devices=ranks, strategy=strategy)
    t.fit(Plain(), loader, ckpt_path=ckpt)


def run(folder: Path, name: str, how: str, ranks: int, *args: Any) -> tuple[Any, Any, list[torch.Tensor]]:
    """Weights by epoch, masks, and the samples of each step in a fixed order."""
    if how == "one":
        fit(folder, name, how, ranks, *args)
    else:
        as_by_torchrun(ranks, folder, fit, folder, name, how, ranks, *args)
    found = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(ranks)]
    batches = zip(*(own for *_, own in found), strict=True)  # of each step, those of all ranks
    steps = [torch.cat([torch.tensor(part).view(-1, FEATURES) for part in parts]) for parts in batches]
    return found[0][0], found[0][1], [step[step[:, 0].argsort()] for step in steps]


ONE, DDP2, DDP4 = ("one", 1), ("ddp", 2), ("ddp", 4)
FSDP1, FSDP2, FSDP4 = (("fsdp", ranks) for ranks in (1, 2, 4))
QUICK = [(DDP2, ONE), (ONE, DDP2), (FSDP1, FSDP2), (FSDP2, ONE), (DDP2, FSDP2)]
SLOW = [
    *((DDP2, DDP4), (DDP4, DDP2), (ONE, DDP4), (DDP4, ONE)),
    *((FSDP2, FSDP1), (FSDP2, FSDP4), (FSDP4, FSDP2), (FSDP1, FSDP4), (FSDP4, FSDP1)),
    *((FSDP4, DDP2), (FSDP2, DDP4), (DDP4, FSDP2), (DDP2, FSDP4), (ONE, FSDP4), (("fsdp in a file", 2), ONE)),
]
PAIRS = [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]


@pytest.mark.filterwarnings("ignore:The checkpoint holds the random state")
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=lambda run: "-".join(map(str, run)))
def test_resume_with_another_number_of_processes(
    tmp_path: Path, before: tuple[str, int], after: tuple[str, int]
) -> None:
    weights, masks, steps = run(tmp_path, "whole", *before)
    again, other, rest = run(tmp_path, "again", *after, str(tmp_path / "whole/epoch=1.ckpt"), 99)
    assert all(torch.equal(step, same) for step, same in zip(steps[8:], rest, strict=True)), "the same samples in order"
    assert masks.keys() == other.keys()
    assert all(torch.equal(mask, other[name]) for name, mask in masks.items())
    for name, value in weights[2].items():  # sums over another number of processes differ by rounding alone
        torch.testing.assert_close(again[2][name], value, rtol=0, atol=ALIKE)


@pytest.mark.parametrize("ranks", [2, 4])
def test_one_process_goes_on_in_the_order_of_several(ranks: int) -> None:
    data = ToyData()
    state = {**rng.capture(), "order": [7], "batch_sizes": [16]}
    order, loader = DataOrder(), DataLoader(data, batch_size=16, shuffle=True)
    fake: Any = SimpleNamespace(train_dataloader=loader, current_epoch=0)
    with pytest.warns(UserWarning, match="masks and calibration samples stay the same") as told:
        order.begin(fake, [state] * ranks)
    assert not any("order of the training data differs" in str(one.message) for one in told)
    assert order.state() == {"order": [7], "batch_sizes": [16]}
    for epoch in range(3):
        fake.current_epoch = epoch
        order.begin_epoch(fake)
        shares = [DistributedSampler(data, ranks, rank, seed=7) for rank in range(ranks)]
        for share in shares:
            share.set_epoch(epoch)
        expected = [index for together in zip(*shares, strict=True) for index in together]
        assert list(loader.sampler) == expected


def test_what_differs_is_said() -> None:
    order = DataOrder()
    fake: Any = SimpleNamespace(train_dataloader=DataLoader(ToyData(), batch_size=8, shuffle=True), current_epoch=0)
    order.begin(fake, [])
    state = {**rng.capture(), **order.state()}
    with pytest.warns(UserWarning, match=r"holds the random state of 2 processes.*order .* differs too.*\[8\].*\[16\]"):
        order.begin(fake, [{**state, "batch_sizes": [16]}] * 2)
    weighted = DataLoader(ToyData(), batch_size=8, sampler=WeightedRandomSampler([1.0] * 64, 64))
    fake.train_dataloader = weighted
    order.begin(fake, [{**state, "order": [3]}])
    order.begin_epoch(fake)
    assert order.state()["order"] == [None], "a sampler of another kind keeps its own order"


def test_the_seed_of_the_order_is_the_stopped_runs() -> None:
    loader = DataLoader(ToyData(), batch_size=8, sampler=DistributedSampler(ToyData(), 2, 0, seed=99))
    fake: Any = SimpleNamespace(train_dataloader=loader, current_epoch=0)
    order = DataOrder()
    order.begin(fake, [{"order": [3], "batch_sizes": [8]}])
    order.begin_epoch(fake)
    assert list(loader.sampler) == list(DistributedSampler(ToyData(), 2, 0, seed=3))


def test_more_processes_than_random_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets numbers of its own, the same ones whenever the run goes on."""
    state = rng.capture()

    def drawn(rank: int) -> float:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        assert restore_random_state([state])
        return float(torch.rand(()))

    first = [drawn(rank) for rank in range(3)]
    assert len(set(first)) == 3
    assert first == [drawn(rank) for rank in range(3)]
