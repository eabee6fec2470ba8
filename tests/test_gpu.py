"""Run where a GPU is at hand; skipped elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_cap import prune
from lightning_cap.fisher import memory_plan as planning
from lightning_cap.fisher.blocks import EmpiricalFisher
from lightning_cap.pruners import Magnitude
from lightning_cap.solver import backend, eliminate
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.patterns import NofM, Unstructured
from lightning_cap.sparsity.targets import Targets
from tests.support.toy import Toy, ToyData, cap, loaders, trainer, zeros
from tests.support.toy import callback as pruning

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("pruner", [cap(), cap(ranking="cumulative"), cap(pattern=NofM(2, 4)), Magnitude()], ids=repr)
def test_gpu_and_cpu_prune_alike(pruner: Any) -> None:
    pl.seed_everything(0, verbose=False)
    cpu = Toy().net
    gpu = Toy().net
    gpu.load_state_dict(cpu.state_dict())
    gpu.cuda()
    data = [next(iter(DataLoader(ToyData(noise=0.0), batch_size=64)))]
    a = prune(cpu, data, loss, 0.5, pruner, progress=False)
    b = prune(gpu, data, loss, 0.5, pruner, progress=False)
    assert (a.masks["4.weight"] != b.masks["4.weight"].cpu()).float().mean() < 0.02  # ties by rounding
    assert a.predicted_loss == pytest.approx(b.predicted_loss, rel=1e-3)


@pytest.mark.parametrize("B", [7, 64, 192])
def test_elimination_agrees_with_the_cpu(B: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(2 * B, 5, B)
    fisher = torch.einsum("nki,nkj->kij", rows, rows) / (2 * B)
    weights, alive = torch.randn(5, B), torch.rand(5, B) > 0.1
    cpu = eliminate(fisher, weights, alive, 1e-6, cap().pattern)
    gpu = eliminate(fisher.cuda(), weights.cuda(), alive.cuda(), 1e-6, cap().pattern)
    assert torch.equal(cpu.steps, gpu.steps.cpu())
    total = [float(torch.where(torch.isfinite(e.losses), e.losses, 0.0).sum()) for e in (cpu, gpu)]
    assert total[0] == pytest.approx(total[1], rel=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_events_in_a_run_on_the_gpu(tmp_path: Path, precision: Any) -> None:
    module = Toy()
    trainer(tmp_path, pruning(), accelerator="gpu", precision=precision).fit(module, **loaders())
    assert zeros(module).float().mean() == 0.75


CUDA = torch.device("cuda", 0)


def blocks_of(B: int, K: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(K, 2 * B, B, generator=generator)
    return rows.mT @ rows / (2 * B), torch.randn(K, B, generator=generator), torch.rand(K, B, generator=generator) > 0.1


@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4)])
@pytest.mark.parametrize("damp", [0.5, 1e-6])
@pytest.mark.parametrize("B", [8, 64, 128, 192])
def test_triton_gives_the_order_of_the_cpu(B: int, damp: float, pattern: Any) -> None:
    reason = backend.unavailable(CUDA)
    if reason is not None:
        pytest.skip(reason)
    fisher, weights, alive = blocks_of(B)
    cpu = eliminate(fisher, weights, alive, damp, pattern)
    gpu = eliminate(fisher.cuda(), weights.cuda(), alive.cuda(), damp, pattern, backend="triton")
    assert torch.equal(cpu.steps, gpu.steps.cpu())
    assert (cpu.rank == gpu.rank.cpu()).float().mean() > 0.95
    total = [float(torch.where(torch.isfinite(e.losses), e.losses, 0.0).sum()) for e in (cpu, gpu)]
    assert total[0] == pytest.approx(total[1], rel=1e-3)


def rows_for(layout: BlockLayout, n: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {name: torch.randn(n, *shape, generator=generator) for name, shape in layout.shapes.items()} for _ in range(3)
    ]


@pytest.mark.parametrize("storage", ["full", "packed"])
@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_fisher_of_gpu_rows(storage: Any, place: str) -> None:
    layout = BlockLayout({"a": (50, 24), "b": (7, 5)}, 16)
    chunks = rows_for(layout, 37)
    expected = EmpiricalFisher(layout, torch.device("cpu"), storage="full")
    found = EmpiricalFisher(
        layout, CUDA, 16, storage, torch.device(place, 0) if place == "cuda" else torch.device("cpu")
    )
    for chunk in chunks:
        expected.update(chunk)
        found.update({name: rows.cuda() for name, rows in chunk.items()})
    index = torch.tensor([0, 3, layout.num_blocks - 1])
    blocks = found.finish()[index.cuda()]
    assert blocks.is_cuda
    torch.testing.assert_close(blocks.cpu(), expected.finish()[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", ["host", "passes"])
def test_a_fisher_that_does_not_fit_the_gpu(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(500, 64, generator=generator)}
    rows = [{"a": torch.randn(32, 500, 64, generator=generator).cuda()} for _ in range(4)]
    targets = Targets({name: weight.cuda() for name, weight in weights.items()})
    whole = cap(block_size=64).path(targets, rows)
    if place == "passes":
        monkeypatch.setattr(planning, "free_memory", lambda device: 10**12 if device.type == "cuda" else 0)
    pruner = cap(block_size=64, max_memory=whole.plan.peak_bytes * 2 // 3)
    part = pruner.path(targets, rows)
    assert (part.plan.storage_device.type, part.plan.passes > 1) == (
        ("cpu", False) if place == "host" else ("cuda", True)
    )
    one, other = whole.at(0.75), part.at(0.75)
    assert (one.masks["a"] != other.masks["a"]).float().mean() < 0.01
    assert one.predicted_loss == pytest.approx(other.predicted_loss, rel=1e-3)
