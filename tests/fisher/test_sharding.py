"""The Fisher on 2 and 4 real gloo processes: the same sums, and one plan."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lightning_cap.fisher import memory_plan as planning
from lightning_cap.fisher.blocks import EmpiricalFisher
from lightning_cap.fisher.memory_plan import MemoryPlan
from lightning_cap.pruners import CAP
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from tests.support.processes import on_ranks


def test_the_sums_are_bit_equal_in_global_order(tmp_path: Path) -> None:
    alone = sum_shards()
    for world in (2, 4):
        parts = on_ranks(world, tmp_path, sum_shards)
        assert torch.equal(torch.cat(parts), alone)


def sum_shards() -> Tensor:
    """Rows that rank ``r`` has: number ``r`` of every group of four, several ranks' worth if there are fewer ranks."""
    world, rank = distributed.world_size(), distributed.rank()
    layout = BlockLayout({"a": (9, 7), "b": (4, 10)}, 8)
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(40, *shape, generator=generator) for name, shape in layout.shapes.items()}
    shares = torch.arange(layout.num_blocks).tensor_split(world)
    fisher = EmpiricalFisher(layout, torch.device("cpu"), 8, shares=shares if world > 1 else None)
    size = 4 // world
    for start in range(0, 40, 4):
        mine = slice(start + rank * size, start + (rank + 1) * size)
        fisher.update({name: r[mine] for name, r in rows.items()})
    blocks = fisher.finish()
    assert fisher.count == 40
    return blocks[torch.arange(len(blocks))]


def test_memory_of_the_rank_that_has_least_decides(tmp_path: Path) -> None:
    plans = on_ranks(2, tmp_path, plan_here)
    assert plans[0] == plans[1]
    assert plans[0][0] > 1


def plan_here() -> tuple[int, int]:
    planning.free_memory = lambda device: 4 * 10**6 if distributed.rank() else 10**12
    targets = Targets({"a": torch.ones(300, 64)})
    plan: MemoryPlan = CAP(block_size=64, storage="full", backend="torch").plan(targets)
    return plan.passes, plan.peak_bytes
