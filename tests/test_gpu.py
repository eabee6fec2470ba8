"""Run where a GPU is at hand; skipped elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from toy import Toy, ToyData, cap, loaders, trainer, zeros
from toy import callback as pruning

from lightning_cap import prune
from lightning_cap.patterns import NofM
from lightning_cap.pruners import Magnitude
from lightning_cap.solver import eliminate

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
