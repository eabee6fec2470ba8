"""The engine under the pruners that work in blocks: passes, memory, settings."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.calibration.sources import NO_MEMORY, SourceMemory
from lightning_cap.errors import ConfigError, GradientError
from lightning_cap.pruners import CAP, blockwise_path
from lightning_cap.sparsity.patterns import NofM
from lightning_cap.sparsity.targets import Targets
from tests.support.memory import with_passes
from tests.support.problems import gradient_rows, random_targets, same_result
from tests.support.pruners import CASES
from tests.support.quadratic import Quadratic


class Counted:
    """Rows that tell how often they were read."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows, self.passes = rows, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.passes += 1
        yield from self.rows


def _scarce(targets: Targets, passes: int, source: SourceMemory = NO_MEMORY, **settings: Any) -> CAP:
    """With just the memory for so many passes."""
    pruner: CAP = with_passes(passes, partial(CAP, **settings), targets, source)
    return pruner


def test_passes_that_shrink_differently_are_told() -> None:
    problem = Quadratic({"a": (60, 24), "b": (20, 12)})
    for shrinkage, heard in ((0.5, 1), (0.0, 0)):
        pruner = _scarce(problem.targets, 2, block_size=24, damp=1e-3, shrinkage=shrinkage)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruner.path(problem.targets, problem.rows)
        assert len([w for w in caught if "only in 2 passes" in str(w.message)]) == heard


@pytest.mark.parametrize("pattern", [None, NofM(2, 4)])
@pytest.mark.parametrize("passes", [2, 5])
@pytest.mark.parametrize("storage", ["packed", "full"])
def test_passes_over_groups_of_blocks_give_the_same_result(storage: Any, passes: int, pattern: Any) -> None:
    shapes = {"a": (60, 24), "conv": (8, 4, 3, 3), "b": (20, 12)}
    problem = Quadratic(shapes)
    masks = {"a": torch.rand(60, 24, generator=torch.Generator().manual_seed(0)) > 0.3}
    masks["a"][:4] = False  # whole blocks
    settings: dict[str, Any] = {
        "block_size": 24,
        "damp": 1e-3,
        "storage": storage,
        "pattern": pattern,
        "shrinkage": 0.0,
    }
    whole = CAP(**settings).path(problem.targets, problem.rows, masks)
    source = Counted(problem.rows)
    pruner = _scarce(problem.targets, passes, **settings)
    parts = pruner.path(problem.targets, source, masks)
    assert parts.plan.passes == source.passes > 1
    for count, sparsity in enumerate([0.5] if pattern else [0.5, 0.9], start=2):
        one, other = whole.at(sparsity), parts.at(sparsity)
        assert other.stats["passes"] == parts.plan.passes
        for name in shapes:
            assert torch.equal(one.masks[name], other.masks[name])
            assert torch.equal(one.weights[name], other.weights[name])
        assert one.predicted_loss == other.predicted_loss
        assert source.passes == count * parts.plan.passes, "read again to build the weights"


def test_several_passes_need_a_source_that_can_be_read_again() -> None:
    problem = Quadratic({"a": (60, 24)})
    pruner = _scarce(problem.targets, 2, block_size=24)
    with pytest.raises(GradientError, match=r"in 2 passes over the gradients, but the source is an iterator"):
        pruner.path(problem.targets, iter(problem.rows))


def test_passes_find_out_that_the_weights_have_changed() -> None:
    problem = Quadratic({"a": (60, 24)})
    targets = problem.targets
    path = _scarce(targets, 2, block_size=24, damp=1e-3).path(targets, problem.rows)
    result = path.at(0.5)
    result.apply(targets)
    with pytest.raises(GradientError, match="the weights have changed since it was made"):
        path.at(0.7)


def test_passes_find_out_that_the_gradients_differ() -> None:
    problem = Quadratic({"a": (60, 24)})
    source = Counted(problem.rows)
    path = _scarce(problem.targets, 2, block_size=24, damp=1e-3).path(problem.targets, source)
    source.rows = Quadratic({"a": (60, 24)}, seed=1).rows
    with pytest.raises(GradientError, match="differ between two passes"):
        path.at(0.5)


def test_what_the_rows_took_is_given_back_before_the_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Quadratic({"a": (10, 16)})
    calls: list[str] = []

    class Told(CAP):
        def read_blocks(self, *args: Any) -> Any:
            calls.append("read")
            return super().read_blocks(*args)

        def order_blocks(self, *args: Any) -> Any:
            calls.append("solve")
            return super().order_blocks(*args)

    monkeypatch.setattr(blockwise_path, "release_memory", lambda device: calls.append("release"))
    Told(block_size=16, damp=1e-3).path(problem.targets, problem.rows)
    assert calls == ["read", "release", "solve"]


def test_an_iterator_inside_a_collector_is_found_out() -> None:
    model = nn.Linear(24, 60, bias=False)
    targets = Targets({"weight": model.weight})
    batches = iter([torch.randn(8, 24)])
    source = GradientCollector(model, targets, lambda m, b: m(b).square().mean(), batches, 8)
    pruner = _scarce(targets, 2, source.memory(), block_size=24, damp=1e-3)
    with pytest.raises(GradientError, match="the source is an iterator"):
        pruner.path(targets, source)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize(("gradients", "weights"), [(1e17, 1e3), (1.0, 1e21)])
def test_losses_beyond_float32_still_give_the_exact_sparsity(backend: Any, gradients: float, weights: float) -> None:
    problem = Quadratic({"a": (10, 16)})
    targets = Targets({"a": problem.w0["a"] * weights})
    rows = [{name: gradients * r for name, r in chunk.items()} for chunk in problem.rows]
    path = CAP(block_size=16, damp=1e-4, backend=backend).path(targets, rows)
    for sparsity in (0.5, 0.9):
        result = path.at(sparsity)
        assert int((~result.masks["a"]).sum()) == int(160 * sparsity)
        assert result.weights["a"].isfinite().all()


def test_fully_masked_blocks_take_no_memory() -> None:
    problem = Quadratic({"a": (60, 24), "b": (4, 4)})
    masks = {"a": torch.zeros(60, 24, dtype=torch.bool)}
    path = CAP(block_size=24, damp=1e-3).path(problem.targets, problem.rows, masks)
    assert [len(group) for group in path.plan.groups] == [1]
    result = path.at(0.995)
    assert not result.weights["a"].any()
    assert result.masks["b"].sum() == 1456 - int(0.995 * 1456 + 0.5)


def test_the_row_chunk_is_part_of_the_state() -> None:
    pruner = CAP(row_chunk=8)
    other = CAP()
    other.load_state_dict(pruner.state_dict())
    assert other.row_chunk == 8
    other.load_state_dict({})
    assert other.row_chunk == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"storage": "half"}, "storage='half'"),
        ({"row_chunk": 0}, "row_chunk=0"),
        ({"max_memory": "lots"}, "max_memory='lots'"),
    ],
)
def test_bad_settings_of_the_engine(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CAP(**settings)


def test_a_backend_that_cannot_run_is_refused_before_any_gradient() -> None:
    with pytest.raises(ConfigError, match="backend='cuda'"):
        CAP(backend="cuda").check(Quadratic({"a": (4, 4)}).targets)  # type: ignore[arg-type]


_PEAK = r"""
import re, sys, torch
from pathlib import Path
from lightning_cap.pruners import CAP, blockwise_path
from lightning_cap.sparsity import Targets
B, blocks = int(sys.argv[4]), int(sys.argv[5])
settings = dict(block_size=B, num_gradients=64, damp=float(sys.argv[1]), storage=sys.argv[2])
passes = int(sys.argv[3])
class Rows:
    def __init__(self, rows, n): self.rows, self.n = rows, n
    def __iter__(self):
        for _ in range(self.n): yield {"w": self.rows}
def run(blocks, n, limit=None):
    torch.manual_seed(0)
    targets = Targets({"w": torch.randn(blocks, B)})
    source = Rows(torch.randn(8, blocks, B), n)
    kilobytes = lambda key: int(re.search(key + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    with CAP(**settings, max_memory=limit).path(targets, source) as path:
        result = path.at(0.75)
    return path.plan, (kilobytes("VmHWM") - before) * 1024
run(50, 2)
plan, peak = run(blocks, 8)
if passes > 1:
    plan, peak = run(blocks, 8, plan.peak_bytes // passes)
print(plan.passes, plan.peak_bytes, peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
@pytest.mark.parametrize(
    ("storage", "damp", "passes", "B", "blocks"),
    [
        ("packed", 1.0, 1, 192, 1500),
        ("packed", 1e-6, 1, 192, 1500),
        ("full", 1.0, 1, 192, 1500),
        ("packed", 1.0, 3, 192, 3000),
        ("packed", 1.0, 4, 64, 20000),
    ],
)
def test_peak_memory_is_what_the_plan_says(storage: str, damp: float, passes: int, B: int, blocks: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once
    command = [sys.executable, "-W", "ignore", "-c", _PEAK, str(damp), storage, *map(str, (passes, B, blocks))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, planned, peak = map(int, done.stdout.split())
    assert (found > 1) is (passes > 1)
    assert 0.8 * planned < peak < 1.1 * planned, (planned / 2**20, peak / 2**20)


@pytest.mark.parametrize("name", ["cap", "woodfisher", "mfac", "fast-cap"])
def test_blocks_are_no_larger_than_targets(name: str) -> None:
    """A block of 10 ** 9 weights took minutes and gigabytes of padding."""
    targets, case = random_targets(), CASES[name]
    rows = gradient_rows(targets, 12)
    one, two = (case.kind(block_size=size, num_gradients=12, damp=1e-2).path(targets, rows) for size in (96, 10**30))
    assert one._layout.num_blocks == two._layout.num_blocks
    assert same_result(one.at(0.5), two.at(0.5))
