from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_cap.errors import ConfigError
from lightning_cap.fisher import shrinkage
from lightning_cap.fisher.blocks import EmpiricalFisher, Storage
from lightning_cap.fisher.shrinkage import block_places, shrink_blocks
from lightning_cap.sparsity.block_layout import BlockLayout, Selection
from lightning_cap.utilities import distributed
from tests.support.processes import on_ranks

SHAPES = {"a": (6, 8), "conv": (4, 2, 3, 3), "bias": (12,)}
CPU = torch.device("cpu")


def _rows(count: int = 20) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(count, *shape, generator=generator) for name, shape in SHAPES.items()}
    rows["a"][:, 2, 3] = 0  # a weight without gradient
    rows["a"][:, 4] *= 100
    return rows


def _blocks(layout: BlockLayout, shrinkage: float, storage: str = "packed") -> Tensor:
    fisher = EmpiricalFisher(layout, CPU, storage=storage, shrinkage=shrinkage)  # type: ignore[arg-type]
    fisher.update(_rows())
    found = fisher.finish()
    return found[torch.arange(len(found))]


@pytest.mark.parametrize("shapes", [{"a": (9, 8)}, {"a": (1, 8)}], ids=["pooled", "alone"])
def test_processes_tell_each_other_on_their_device(monkeypatch: pytest.MonkeyPatch, shapes: dict[str, Any]) -> None:
    """As NCCL knows no tensor of main memory, wherever the sums are kept."""
    layout, told = BlockLayout(shapes, 8), []

    def gather(tensor: Tensor) -> list[Tensor]:
        told.append(tensor.device.type)
        return [torch.tensor([layout.num_blocks])]

    def total(tensor: Tensor) -> Tensor:
        told.append(tensor.device.type)
        return torch.ones(tensor.shape, dtype=tensor.dtype)

    monkeypatch.setattr(shrinkage.distributed, "gather_tensors", gather)
    monkeypatch.setattr(shrinkage.distributed, "sum_over_ranks", total)
    sums = EmpiricalFisher(layout, CPU, storage="full")._sums
    shrink_blocks(sums, layout, Selection(layout), 0.5, torch.device("meta"))  # type: ignore[arg-type]
    assert told == ["meta"] * (2 if layout.num_blocks > 1 else 1)


def _shrunk(blocks: Tensor, places: list[int], share: float) -> Tensor:
    """By the formula, a block at a time, in float64."""
    out = blocks.double().clone()
    for b, place in enumerate(places):
        members = [k for k, other in enumerate(places) if other == place]
        pooled = blocks[members].double().sum(0)
        for i in range(blocks.shape[1]):
            for j in range(blocks.shape[1]):
                scale = float(pooled[i, i] * pooled[j, j]) ** 0.5
                correlation = float(pooled[i, j]) / scale if scale else 0.0
                own = float(blocks[b, i, i] * blocks[b, j, j]) ** 0.5
                if i != j:
                    out[b, i, j] = (1 - share) * out[b, i, j] + share * correlation * own
    return out


@pytest.mark.parametrize("storage", ["packed", "full"])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("block_size", "group"), [(4, 1), (6, 1), (8, 2)])
def test_correlations_are_shrunk_towards_those_of_the_layer(
    storage: str, by_row: bool, block_size: int, group: int
) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if group == 1 or name != "bias"}
    layout = BlockLayout(shapes, block_size, group, by_row)
    plain = _blocks(layout, 0.0)
    shrunk = _blocks(layout, 0.3, storage)
    torch.testing.assert_close(
        shrunk.double(), _shrunk(plain, block_places(layout).tolist(), 0.3), atol=2e-5, rtol=2e-5
    )
    torch.testing.assert_close(shrunk.diagonal(dim1=1, dim2=2), plain.diagonal(dim1=1, dim2=2), rtol=1e-6, atol=0)
    assert not torch.equal(shrunk, plain)
    assert torch.linalg.eigvalsh(shrunk.double()).min() > -1e-3


def test_places_are_those_of_the_rows() -> None:
    layout = BlockLayout({"a": (4, 6), "b": (3, 4, 2), "bias": (8,)}, 4)
    a, b, bias = [0, 2, 1, 0, 2, 1], [3, 4, 3, 4, 3, 4], [5, 6]
    assert block_places(layout).tolist() == a + b + bias
    by_row = BlockLayout({"a": (4, 6), "b": (3, 4)}, 4, by_row=True)
    assert block_places(by_row).tolist() == [0, 1] * 4 + [2] * 3


def test_what_is_alone_stays_as_it_is() -> None:
    layout = BlockLayout({"a": (1, 8), "b": (5, 8)}, 8)
    fishers = [EmpiricalFisher(layout, CPU, shrinkage=share) for share in (0.0, 1.0)]
    rows = {
        name: torch.randn(9, *shape, generator=torch.Generator().manual_seed(1))
        for name, shape in layout.shapes.items()
    }
    for fisher in fishers:
        fisher.update(rows)
    plain, shrunk = (fisher.finish()[torch.arange(6)] for fisher in fishers)
    assert torch.equal(plain[0], shrunk[0])
    correlations = [block / block.diagonal().sqrt().outer(block.diagonal().sqrt()) for block in shrunk[1:]]
    for other in correlations[1:]:
        torch.testing.assert_close(other, correlations[0], atol=1e-5, rtol=1e-5)


def test_finds_the_true_curvature_from_fewer_samples() -> None:
    """Gradients of a linear layer: an output's gradient times correlated inputs, of another size in each row."""
    generator = torch.Generator().manual_seed(0)
    mixing, sizes = (
        torch.randn(32, 32, generator=generator) / 6 + torch.eye(32),
        torch.rand(64, generator=generator) + 0.1,
    )

    def blocks(count: int, shrinkage: float) -> Tensor:
        fisher = EmpiricalFisher(BlockLayout({"w": (64, 32)}, 32), CPU, shrinkage=shrinkage)
        inputs = torch.randn(count, 32, generator=generator) @ mixing
        outputs = torch.randn(count, 64, generator=generator) * sizes
        fisher.update({"w": outputs.unsqueeze(2) * inputs.unsqueeze(1)})
        return fisher.finish()[torch.arange(64)]

    truth = (sizes**2).view(-1, 1, 1) * (mixing.T @ mixing)
    errors = [float((blocks(64, share) - truth).norm()) for share in (0.0, 0.8)]
    assert errors[1] < 0.75 * errors[0]  # the diagonal, which stays, included


@pytest.mark.parametrize("storage", ["packed", "full"])
@pytest.mark.parametrize("idle", [False, True])
def test_processes_pool_their_blocks(tmp_path: Path, storage: Storage, idle: bool) -> None:
    alone = shard_shrunk(storage, idle)
    parts = on_ranks(2, tmp_path, shard_shrunk, storage, idle)
    torch.testing.assert_close(torch.cat(parts), alone, rtol=1e-6, atol=1e-6)


def shard_shrunk(storage: Storage, idle: bool) -> Tensor:
    """The blocks of this process; if ``idle``, all are the first one's."""
    world, rank = distributed.world_size(), distributed.rank()
    layout = BlockLayout({"a": (9, 7), "b": (4, 10)}, 8)
    blocks = torch.arange(layout.num_blocks)
    shares = [blocks, *[blocks[:0]] * (world - 1)] if idle else blocks.tensor_split(world)
    fisher = EmpiricalFisher(layout, CPU, storage=storage, shares=shares if world > 1 else None, shrinkage=0.5)
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(12, *shape, generator=generator) for name, shape in layout.shapes.items()}
    for start in range(0, 12, world):
        fisher.update({name: r[start + rank : start + rank + 1] for name, r in rows.items()})
    blocks = fisher.finish()
    return blocks[torch.arange(len(blocks))]


def test_refuses_what_is_no_share() -> None:
    with pytest.raises(ConfigError, match=r"shrinkage=1\.5"):
        EmpiricalFisher(BlockLayout({"a": (2, 4)}, 4), CPU, shrinkage=1.5)
