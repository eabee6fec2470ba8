from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_cap.calibration.sources import SourceMemory
from lightning_cap.errors import ConfigError
from lightning_cap.fisher import memory_plan as planning
from lightning_cap.fisher.memory_plan import Deployment, MemoryModel, MemoryPlan, plan_event, plan_reading, planned_for
from lightning_cap.pruners import CAP, Magnitude
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.memory import free_memory

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


MB = 10**6


def _free(monkeypatch: pytest.MonkeyPatch, **free: int) -> None:
    monkeypatch.setattr(planning, "free_memory", lambda device: free.get(device.type))


def test_an_event_that_cannot_fit_is_refused_with_numbers_and_remedy() -> None:
    plan = MemoryPlan(CPU, 3 * 2**30, 2 * 2**30, "max_memory")
    with pytest.raises(
        ConfigError, match=r"max_memory: .* needs 3\.00 GiB on cpu, where 2\.00 GiB may be used.*smaller"
    ):
        plan.check()
    MemoryPlan(CPU, 2**30, 2**30).check()
    MemoryPlan(CPU, 2**60, None).check()


def test_a_gpu_keeps_the_fisher_itself_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = MemoryModel(64, 1000, 32, "auto")  # 16.4 MB of blocks, 8.2 MB of rows; solving takes 7.5 GB at full chunks
    blocks = torch.arange(1000)
    _free(monkeypatch, cuda=100_000 * MB, cpu=10_000 * MB)
    plan = plan_event(sizes, blocks, CUDA)
    assert (plan.storage_device, plan.passes, plan.host_bytes) == (CUDA, 1, 0)
    assert plan.limit == 80_000 * MB


def test_a_large_fisher_goes_to_the_host_and_then_into_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = MemoryModel(192, 10**6, 32, "auto", source=SourceMemory(0, 80 * MB, 80 * MB, 10))  # 147 GB
    blocks = torch.arange(10**6)
    _free(monkeypatch, cuda=100_000 * MB, cpu=250_000 * MB)
    plan = plan_event(sizes, blocks, CUDA)
    assert (plan.storage_device, plan.passes) == (CPU, 1)
    assert plan.peak_bytes < 25_000 * MB
    assert 74_000 * MB < plan.host_bytes < 200_000 * MB, "packed, and two row buffers"
    _free(monkeypatch, cuda=100_000 * MB, cpu=100_000 * MB)
    plan = plan_event(sizes, blocks, CUDA)
    assert (plan.storage_device, plan.passes) == (CUDA, 3)
    assert plan.peak_bytes <= 80_000 * MB
    assert torch.equal(torch.cat(plan.groups), blocks)


def test_another_machine_is_planned_for() -> None:
    """Its processes, its device and its memory, which need not be here."""
    sizes = MemoryModel(192, 10**5, 32, "auto", "numba", SourceMemory(0, 80 * MB, 80 * MB, 10))
    blocks = torch.arange(10**5)
    with planned_for(Deployment(CUDA, 10_000 * MB, 100_000 * MB, processes=4)):
        plan = plan_event(sizes, blocks, CPU)
        few = plan_event(sizes, blocks, CPU, max_memory=2_000 * MB)
        assert plan_reading(CPU, SourceMemory(0, MB, MB, 10), 0, 0).limit == 8_000 * MB
    assert (plan.device, plan.storage_device, plan.limit) == (CUDA, CUDA, 8_000 * MB)
    assert [len(share) for share in plan.shares[0]] == [25_000] * 4
    assert plan.passes == 1
    assert few.storage_device == CPU
    here = plan_event(sizes, blocks, CPU)
    assert here.device == CPU
    assert len(here.shares[0]) == 1
    with planned_for(Deployment(CUDA)):
        assert plan_event(sizes, blocks, CPU).limit is None


def test_passes_on_the_cpu_keep_the_limit() -> None:
    sizes = MemoryModel(64, 5000, 32, "full", source=SourceMemory(10 * MB, 0, 10 * MB), busy_blocks=2500)
    blocks = torch.arange(0, 5000, 2)
    whole = plan_event(sizes, blocks, CPU, 10**12)
    assert whole.passes == 1
    half = plan_event(sizes, blocks, CPU, 60 * MB)
    most = sizes.most_blocks(CPU, 60 * MB, half.chunk, 1)
    assert (
        sizes.bytes_on_device(most, CPU, half.chunk, 1) <= 60 * MB < sizes.bytes_on_device(most + 1, CPU, half.chunk, 1)
    )
    assert 1 < half.passes == -(-2500 // most)
    assert half.peak_bytes == sizes.bytes_on_device(len(half.groups[0]), CPU, half.chunk, 1)
    assert torch.equal(torch.cat(half.groups), blocks)
    assert half.chunk < whole.chunk, "no more than a quarter for the solver"
    none = plan_event(sizes, blocks, CPU, 1000)
    assert none.passes == 2500
    with pytest.raises(ConfigError, match=r"max_memory: .*more with max_memory"):
        none.check()


def test_masked_blocks_are_not_planned_for() -> None:
    targets = Targets({"w": torch.ones(100, 64)})
    mask = torch.zeros(100, 64, dtype=torch.bool)
    mask[:3] = True
    pruner = CAP(block_size=64)
    assert pruner.plan(targets, {"w": mask}).groups[0].tolist() == [0, 1, 2]
    assert pruner.plan(targets).peak_bytes - pruner.plan(targets, {"w": mask}).peak_bytes >= 97 * 64 * 65 * 2


def test_a_block_too_large_for_this_machine_is_refused() -> None:
    if free_memory(CPU) is None:
        pytest.skip("the system does not tell its free memory")
    sizes = MemoryModel(2**18, 64, 32, "packed")
    with pytest.raises(ConfigError, match="smaller block_size"):
        plan_event(sizes, torch.arange(64), CPU).check()


def test_the_plan_says_what_it_is() -> None:
    targets = Targets({"a": torch.ones(10, 10), "b": torch.ones(3)})
    plan = CAP(block_size=16).plan(targets, source=SourceMemory(row=1000))
    assert plan.peak_bytes >= 8 * 16 * 17 * 2 + 1000
    assert str(plan).startswith("Fisher on cpu, ")
    assert str(MemoryPlan(CUDA, 2**30, storage_device=CPU, host_bytes=2**31)).endswith(
        "on cpu, solved on cuda:0, 1.00 GiB, 2.00 GiB of main memory"
    )
    assert Magnitude().plan(targets).peak_bytes == 58 * targets.numel


#: Of 100 MB for the Fisher and 10 MB for its rows, with up to 8 gradient rows of 1 MB at once, which take 20 MB each.
READ = MemoryModel(128, 3000, 8, "packed", "numba", SourceMemory(10 * MB, 20 * MB, MB, 8))


def test_less_memory_means_fewer_rows_at_once_then_passes_then_an_error() -> None:
    blocks = torch.arange(3000)
    whole = plan_event(READ, blocks, CPU, 10**12)
    assert (whole.rows, whole.passes) == (8, 1)
    found = [plan_event(READ, blocks, CPU, int(whole.peak_bytes / share)) for share in (1, 1.5, 2, 4, 6)]
    assert [plan.rows for plan in found] == sorted((plan.rows for plan in found), reverse=True)
    assert [plan.passes for plan in found] == sorted(plan.passes for plan in found)
    assert found[1].rows == 2
    assert found[1].passes == 1, "fewer rows cost less than another pass"
    assert found[-1].rows == 1
    assert found[-1].passes > 2
    for plan in found:
        plan.check()
        assert plan.peak_bytes <= plan.limit
    with pytest.raises(ConfigError, match="one gradient row and one Fisher block at a time"):
        plan_event(READ, blocks, CPU, 35 * MB).check()


def test_forward_and_backward_passes_count_while_gradients_are_read() -> None:
    blocks = torch.arange(3000)
    free = plan_event(replace(READ, source=SourceMemory()), blocks, CPU, 10**12)
    assert plan_event(READ, blocks, CPU, 10**12).peak_bytes - free.peak_bytes > 120 * MB


def test_a_method_without_a_limit_takes_as_many_rows_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SourceMemory(0, 20 * MB, MB, 8)
    _free(monkeypatch, cpu=1000 * MB)
    assert plan_reading(CPU, source, 10 * MB, 0, 50 * MB) == MemoryPlan(CPU, 170 * MB, 800 * MB, "include", rows=8)
    _free(monkeypatch, cpu=100 * MB)
    assert plan_reading(CPU, source, 10 * MB, 0, 50 * MB) == MemoryPlan(CPU, 50 * MB, 80 * MB, "include", rows=2)
    with pytest.raises(ConfigError, match=r"needs 81\.1 MiB on cpu, where 76\.3 MiB"):
        plan_reading(CPU, source, 10 * MB, 0, 85 * MB)
