from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.errors import ConfigError, GradientError, PatternError
from lightning_cap.pruners import CAP, Magnitude, PruneResult
from lightning_cap.sparsity.patterns import NofM
from lightning_cap.sparsity.targets import Targets
from tests.references.obs import best_weights, obs_block


class Quadratic:
    """Independent least-squares problems at their minimum: ``1/2 mean_i (x_i · (w - w0))²``, so each gradient outer
    product of ``x_i`` is the Hessian's own."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], n: int = 200, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x: dict[str, Tensor] = {}
        self.w0: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            d = torch.Size(shape).numel()
            mix = torch.eye(d) + 2.0 * torch.randn(d, d, generator=generator) / d**0.5
            self.x[name] = torch.randn(n, d, generator=generator) @ mix
            self.w0[name] = torch.randn(shape, generator=generator)

    @property
    def targets(self) -> Targets:
        return Targets({name: nn.Parameter(w.clone()) for name, w in self.w0.items()})

    @property
    def rows(self) -> list[dict[str, Tensor]]:
        rows = {name: x.view(-1, *self.w0[name].shape) for name, x in self.x.items()}
        return [{name: r[i : i + 64] for name, r in rows.items()} for i in range(0, 200, 64)]

    def increase(self, result: PruneResult, block_size: int, damp: float = 0.0) -> float:
        """``1/2 Δᵀ (F + damp) Δ`` summed over blocks, in float64 from the samples."""
        total = 0.0
        for name, w0 in self.w0.items():
            delta = (result.weights[name].double() - w0.double()).flatten()
            for d, x in zip(delta.split(block_size), self.x[name].double().split(block_size, 1), strict=True):
                total += 0.5 * float((x @ d).square().mean() + damp * d.square().sum())
        return total


SHAPES = {"a": (6, 8), "conv": (4, 3, 3, 3), "b": (1, 5)}


@pytest.mark.parametrize("ranking", ["marginal", "cumulative"])
@pytest.mark.parametrize("block_size", [1, 7, 24, 200])
@pytest.mark.parametrize("damp", [1e-8, 1e-1])
def test_predicted_loss_is_the_true_one(ranking: Any, block_size: int, damp: float) -> None:
    problem = Quadratic(SHAPES)
    path = CAP(block_size=block_size, damp=damp, ranking=ranking).path(problem.targets, problem.rows)
    for sparsity in (0.2, 0.5, 0.75, 0.95):
        result = path.at(sparsity)
        assert result.predicted_loss == pytest.approx(problem.increase(result, block_size, damp), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_beats_magnitude_where_weights_are_correlated(seed: int) -> None:
    problem = Quadratic(SHAPES, seed=seed)
    cap = CAP(block_size=200, damp=1e-6).path(problem.targets, problem.rows)
    magnitude = Magnitude().path(problem.targets)
    for sparsity in (0.3, 0.5, 0.7, 0.9):
        ours, theirs = (problem.increase(path.at(sparsity), 200) for path in (cap, magnitude))
        assert ours < 0.75 * theirs


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_marginal_ranking_predicts_no_more_than_cumulative(sparsity: float) -> None:
    problem = Quadratic(SHAPES)
    losses = {
        ranking: CAP(block_size=8, damp=1e-6, ranking=ranking)
        .path(problem.targets, problem.rows)
        .at(sparsity)
        .predicted_loss
        for ranking in ("marginal", "cumulative")
    }
    assert losses["marginal"] < losses["cumulative"]


@pytest.mark.parametrize("pattern", [None, NofM(2, 4)])
def test_agrees_with_the_textbook_from_gradients_to_weights(pattern: NofM | None) -> None:
    """The whole way: gradients, Fisher, layout, elimination and reconstruction of a linear and a convolution weight."""
    problem = Quadratic({"linear": (3, 8), "conv": (2, 4, 1, 3)})
    result = CAP(block_size=24, damp=1e-3, pattern=pattern).path(problem.targets, problem.rows).at(0.5)
    zeros = 0
    for name, w0 in problem.w0.items():
        # inputs last where groups lie along them
        order = np.arange(24).reshape(w0.shape)
        order = (np.moveaxis(order, 1, -1) if pattern is not None else order).flatten()
        x = problem.x[name].double().numpy()[:, order]
        fisher, weights = x.T @ x / len(x), w0.flatten().numpy()[order]
        reference = obs_block(fisher, weights, np.ones(24, dtype=bool), 1e-3, (2, 4) if pattern is not None else None)
        kept = result.masks[name].flatten().numpy()[order]
        count = int((~kept).sum())
        assert set(np.flatnonzero(~kept).tolist()) == set(reference.order[:count])
        best = best_weights(fisher, weights, kept, 1e-3)
        np.testing.assert_allclose(result.weights[name].flatten().numpy()[order], best, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(best, reference.weights[count], rtol=1e-6, atol=1e-8)
        zeros += count
    assert zeros == 24


def test_gradually_reached_sparsity_stays_exact() -> None:
    problem = Quadratic(SHAPES)
    targets, masks = problem.targets, None
    for sparsity in (0.3, 0.5, 0.8):
        result = CAP(block_size=16, damp=1e-4).path(targets, problem.rows, masks).at(sparsity)
        assert result.sparsity == pytest.approx(sparsity, abs=1 / targets.numel)
        if masks is not None:
            assert not any((result.masks[n] & ~masks[n]).any() for n in masks)
        result.apply(targets)
        masks = dict(result.masks)


def test_blocks_that_need_more_damp_are_reported() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = {"w": 1e6 * torch.randn(3, 4, 8, generator=generator), "v": torch.randn(3, 1, 8, generator=generator)}
    targets = Targets({name: nn.Parameter(torch.randn(g.shape[1:], generator=generator)) for name, g in rows.items()})
    with pytest.warns(
        UserWarning, match=r"damp=0\.01: [1-4] of 5 Fisher blocks factored only with a larger one.*Raise damp"
    ):
        path = CAP(block_size=8, damp=1e-2).path(targets, [rows])
    result = path.at(0.5)
    assert 1 <= result.stats["blocks_damping_increased"] <= 4
    assert result.stats["blocks_float64"] >= result.stats["blocks_damping_increased"]
    assert result.stats["blocks"] == 5
    assert all(w.isfinite().all() for w in result.weights.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"num_gradients": 0}, "num_gradients=0"),
        ({"samples_per_gradient": -1}, "samples_per_gradient=-1"),
        ({"damp": 0.0}, "damp=0.0"),
        ({"damp": -1e-8}, "damp=-1e-08"),
        ({"damp": float("nan")}, "damp=nan"),
        ({"damp": float("inf")}, "damp=inf"),
        ({"ranking": "local"}, "ranking='local'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CAP(**arguments)


def test_bad_gradients() -> None:
    problem = Quadratic(SHAPES)
    with pytest.raises(GradientError, match="no gradient row"):
        CAP(block_size=8).path(problem.targets, [])
    broken = problem.rows
    broken[1]["a"][3, 2, 2] = float("nan")
    with pytest.raises(GradientError, match="first 'a', are not finite"):
        CAP(block_size=8).path(problem.targets, broken)
    with pytest.raises(PatternError):
        CAP(pattern=124)


# Memory


class Counted:
    """Rows that tell how often they were read."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows, self.passes = rows, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.passes += 1
        yield from self.rows


def _scarce(targets: Targets, passes: int, rows_bytes: int = 0, **settings: Any) -> CAP:
    """With just the memory for so many passes."""
    for limit in range(1000, 10**7, 250):
        pruner = CAP(max_memory=limit, **settings)
        try:
            plan = pruner.plan(targets, rows_bytes=rows_bytes)
        except ConfigError:
            continue
        if plan.passes <= passes:
            assert plan.passes == passes
            return pruner
    raise AssertionError


@pytest.mark.parametrize("pattern", [None, NofM(2, 4)])
@pytest.mark.parametrize("passes", [2, 5])
@pytest.mark.parametrize("storage", ["packed", "full"])
def test_passes_over_groups_of_blocks_give_the_same_result(storage: Any, passes: int, pattern: Any) -> None:
    shapes = {"a": (60, 24), "conv": (8, 4, 3, 3), "b": (20, 12)}
    problem = Quadratic(shapes)
    masks = {"a": torch.rand(60, 24, generator=torch.Generator().manual_seed(0)) > 0.3}
    masks["a"][:4] = False  # whole blocks
    settings: dict[str, Any] = {"block_size": 24, "damp": 1e-3, "storage": storage, "pattern": pattern}
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


def test_an_iterator_inside_a_collector_is_found_out() -> None:
    model = nn.Linear(24, 60, bias=False)
    targets = Targets({"weight": model.weight})
    batches = iter([torch.randn(8, 24)])
    source = GradientCollector(model, targets, lambda m, b: m(b).square().mean(), batches, 8)
    pruner = _scarce(targets, 2, source.rows_bytes, block_size=24, damp=1e-3)
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
from lightning_cap.pruners import CAP
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
