"""A small model that `fully_shard` (FSDP2) shares out over the processes of a gloo group on CPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.utils.data import DataLoader, Dataset

from tests.support.toy import Toy

SIDE = 4
#: Weights of odd sizes: no number of processes divides their rows, nor a block them; of ``7.weight`` a fourth process has none.
NAMES = ["2.weight", "5.weight", "7.weight"]


class Images(Dataset[Any]):
    """64 small images of four classes."""

    def __init__(self) -> None:
        self.x = torch.randn(64, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.x[index], index % 4


def make_net() -> nn.Module:
    """Always the same."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convs, nn.Linear(12 * SIDE**2, 23), nn.ReLU(), nn.Linear(23, 5), nn.ReLU(), nn.Linear(5, 4))


def shard(model: nn.Module, *inner: nn.Module, **settings: Any) -> nn.Module:
    """Shard a model over all processes, with units of their own for some of its layers."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*inner, model):
        fully_shard(layer, mesh=mesh, **settings)
    return model


def make_sharded(**settings: Any) -> nn.Sequential:
    """`make_net` with two units and the rest."""
    model = make_net()
    assert isinstance(model, nn.Sequential)
    shard(model, model[2], model[5], **settings)
    return model


def image_loader() -> DataLoader[Any]:
    return DataLoader(Images(), batch_size=8)


class ShardedToy(Toy):
    """The toy, sharded where the strategy shards; without batch norm, whose statistics each process has of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.net[1] = nn.Identity()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for layer in (self.net[4], self.net):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
