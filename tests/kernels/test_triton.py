"""The Triton kernels: run by Triton's interpreter on the CPU, compiled for several GPUs, run for real where there is one."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_cap.solver.linalg import restrict
from lightning_cap.solver.torch_backend import eliminate_left_looking
from lightning_cap.solver.triton_backend import Launch, eliminate_triton, unavailable
from lightning_cap.sparsity.patterns import NofM, Pattern, Unstructured
from tests.references.obs import obs_block
from tests.support import ROOT

CPU = torch.device("cpu")
BOTH = pytest.mark.parametrize("in_registers", [True, False], ids=["registers", "left-looking"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

Eliminate = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Eliminate]:
    """`eliminate_triton` in a process that had TRITON_INTERPRET set before triton was imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(unavailable, CPU).result() is None
        yield lambda *args, **named: pool.submit(eliminate_triton, *args, **named).result()


def problem(k: int, B: int, dtype: torch.dtype, damp: float = 0.1) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Damped Fisher blocks, and what is asked of a backend: inverse, floor, weights, alive (a tenth are not)."""
    generator = torch.Generator().manual_seed(B)
    mix = torch.eye(B, dtype=torch.float64) + 0.5 * torch.randn(B, B, generator=generator, dtype=torch.float64) / B**0.5
    rows = torch.randn(k, 4 * B + 4, B, generator=generator, dtype=torch.float64) @ mix
    weights = torch.randn(k, B, generator=generator, dtype=torch.float64)
    alive = torch.rand(k, B, generator=generator) > 0.1
    fisher = rows.mT @ rows / rows.shape[1] + damp * torch.eye(B, dtype=torch.float64)
    return fisher, *factored(fisher, alive, dtype), weights.to(dtype), alive


def factored(fisher: Tensor, alive: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inverses and the floors of their diagonals."""
    matrix, roots = restrict(fisher, alive, torch.zeros(len(fisher)))
    inverse = torch.stack([torch.cholesky_inverse(torch.linalg.cholesky(block)) for block in matrix])
    inverse = inverse / (roots.unsqueeze(-1) * roots.unsqueeze(-2))
    return inverse.to(dtype), roots.square().reciprocal().to(dtype)


def rule(pattern: Pattern) -> tuple[int, int]:
    assert pattern.kept_in_group is not None
    return pattern.group_size, pattern.kept_in_group


def assert_is_obs(
    rank: Tensor, losses: Tensor, fisher: Tensor, weights: Tensor, alive: Tensor, pattern: Pattern
) -> None:
    """Every removal is the oracle's best up to rounding, and costs what the oracle says; what stays has the rank ``B``."""
    tol = 1e-3 if losses.dtype == torch.float32 else 1e-9
    nm = (pattern.n, pattern.m) if isinstance(pattern, NofM) else None
    for k in range(len(weights)):
        count = int((rank[k] < len(rank[k])).sum())
        order = rank[k].argsort(stable=True)[:count].tolist()
        assert rank[k, order].tolist() == list(range(count))
        reference = obs_block(fisher[k].numpy(), weights[k].double().numpy(), alive[k].numpy(), 0.0, nm, order)
        np.testing.assert_allclose(losses[k, :count].double().numpy(), reference.losses, rtol=tol, atol=tol * 1e-3)
        assert (np.array(reference.losses) <= np.array(reference.least) * (1 + tol) + tol * 1e-3).all()
        assert torch.isposinf(losses[k, count:]).all()


# By the interpreter


@BOTH
@DTYPES
@pytest.mark.parametrize("B", [1, 7, 16, 48])
def test_matches_the_oracle_and_the_torch_backend(
    interpreted: Eliminate, B: int, dtype: torch.dtype, in_registers: bool
) -> None:
    fisher, *given = problem(2, B, dtype)
    before = [t.clone() for t in given]
    rank, losses = interpreted(*given, 1, 0, in_registers=in_registers)
    assert losses.dtype == dtype
    assert_is_obs(rank, losses, fisher, given[2], given[3], Unstructured())
    assert torch.equal((rank < B).sum(-1), given[3].sum(-1))
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
    twin = eliminate_left_looking(*given, Unstructured())
    torch.testing.assert_close(losses, twin[1], rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-7)
    if dtype == torch.float64:
        assert torch.equal(rank.long(), twin[0])


def test_larger_blocks_take_the_left_looking_kernel(interpreted: Eliminate) -> None:
    fisher, *given = problem(1, 80, torch.float32)
    assert not Launch.choose(80, torch.float32).in_registers
    assert_is_obs(*interpreted(*given, 1, 0), fisher, given[2], given[3], Unstructured())


@DTYPES
@pytest.mark.parametrize("B", [128, 192, 256])
@pytest.mark.parametrize(
    "pattern", [NofM(3, 4), pytest.param(NofM(2, 4), marks=pytest.mark.slow), pytest.param(Unstructured(), marks=pytest.mark.slow)],
    ids=str,
)  # fmt: skip
def test_large_blocks_close_up_and_are_the_oracles(
    interpreted: Eliminate, B: int, pattern: Pattern, dtype: torch.dtype
) -> None:
    fisher, *given = problem(1, B, dtype)
    assert int(given[3].sum()) % 32, "the first packing comes before 32 removals"
    assert_is_obs(*interpreted(*given, *rule(pattern)), fisher, given[2], given[3], pattern)


@BOTH
@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(1, 4), NofM(4, 8), NofM(2, 3), NofM(7, 16)], ids=str)
def test_n_of_m(interpreted: Eliminate, pattern: NofM, in_registers: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        fisher, *given = problem(2, 48, dtype)
        given[3][0, : pattern.m - pattern.n + 1] = False  # a group that has fewer than n already
        given[:2] = factored(fisher, given[3], dtype)
        rank, losses = interpreted(*given, *rule(pattern), in_registers=in_registers)
        assert_is_obs(rank, losses, fisher, given[2], given[3], pattern)
        kept = (given[3] & (rank == 48)).view(2, -1, pattern.m).sum(-1)
        assert torch.equal(kept, given[3].view(2, -1, pattern.m).sum(-1).clamp_max(pattern.n))


@BOTH
def test_what_dead_weights_hold_does_not_matter(interpreted: Eliminate, in_registers: bool) -> None:
    fisher, _, _, weights, alive = problem(4, 16, torch.float32)
    alive[1] = False
    alive[2, 3:] = False
    inverse, floor = factored(fisher, alive, torch.float32)
    rank, losses = interpreted(inverse, floor, weights, alive, 1, 0, in_registers=in_registers)
    assert_is_obs(rank, losses, fisher, weights, alive, Unstructured())
    assert (rank[~alive] == 16).all()
    for junk in (torch.nan, torch.inf, 1e30):
        for t in (inverse, inverse.mT, floor, weights):
            t[~alive] = junk
        again = interpreted(inverse, floor, weights, alive, 1, 0, in_registers=in_registers)
        assert torch.equal(rank, again[0])
        assert torch.equal(losses, again[1])


@BOTH
@DTYPES
def test_the_lowest_of_equals_goes_first(interpreted: Eliminate, dtype: torch.dtype, in_registers: bool) -> None:
    eye, ones = torch.eye(20, dtype=dtype).expand(2, 20, 20), torch.ones(2, 20, dtype=dtype)
    weights = ones * torch.tensor([1.0, -2.0], dtype=dtype).unsqueeze(1)
    alive = ones.bool()
    rank, losses = interpreted(eye, ones, weights, alive, 1, 0, in_registers=in_registers)
    assert rank.tolist() == [list(range(20))] * 2
    assert torch.equal(losses, weights**2 / 2)
    rank, _ = interpreted(eye, ones, weights, alive, 5, 3, in_registers=in_registers)
    assert rank.tolist() == [[0, 1, 20, 20, 20, 2, 3, 20, 20, 20, 4, 5, 20, 20, 20, 6, 7, 20, 20, 20]] * 2


@BOTH
def test_the_floor_keeps_the_diagonal_up(interpreted: Eliminate, in_registers: bool) -> None:
    _, inverse, _, weights, alive = problem(2, 16, torch.float64)
    floor = inverse.diagonal(dim1=-2, dim2=-1) * 0.9
    rank, losses = interpreted(inverse, floor, weights, alive, 1, 0, in_registers=in_registers)
    twin = eliminate_left_looking(inverse, floor, weights, alive, Unstructured())
    assert torch.equal(rank.long(), twin[0])
    torch.testing.assert_close(losses, twin[1])
    unbound = eliminate_left_looking(inverse, torch.zeros_like(floor), weights, alive, Unstructured())
    assert not torch.allclose(losses, unbound[1]), "the floor had something to do"


@BOTH
def test_every_weight_goes_once_even_where_scores_overflow(interpreted: Eliminate, in_registers: bool) -> None:
    _, *given = problem(2, 16, torch.float32)
    given[2] *= 1e30
    rank, losses = interpreted(*given, 1, 0, in_registers=in_registers)
    for k in range(2):
        assert sorted(rank[k][given[3][k]].tolist()) == list(range(int(given[3][k].sum())))
    assert torch.equal(losses.isfinite().sum(-1), given[3].sum(-1))
    assert (rank[~given[3]] == 16).all()


def test_more_blocks_than_programs(interpreted: Eliminate) -> None:
    _, *given = problem(7, 16, torch.float32)
    given[3][3] = False
    alone = [interpreted(*(t[k : k + 1] for t in given), 1, 0, in_registers=False) for k in range(7)]
    for programs in (1, 2, 5, 7, 9):
        rank, losses = interpreted(*given, 1, 0, in_registers=False, programs=programs)
        assert torch.equal(rank, torch.cat([one[0] for one in alone]))
        assert torch.equal(losses, torch.cat([one[1] for one in alone]))


@BOTH
def test_any_strides_and_no_blocks(interpreted: Eliminate, in_registers: bool) -> None:
    _, *given = problem(3, 16, torch.float32)
    expected = interpreted(*given, 4, 2, in_registers=in_registers)
    wide = [torch.stack([t, t], -1)[..., 0] for t in given]
    assert not any(t.is_contiguous() for t in wide)
    for a, b in zip(expected, interpreted(*wide, 4, 2, in_registers=in_registers), strict=True):
        assert torch.equal(a, b)
    rank, losses = interpreted(*(t[:0] for t in given), 1, 0, in_registers=in_registers)
    assert rank.shape == losses.shape == (0, 16)


# Where it can run


def test_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    with monkeypatch.context() as patch:
        for name in ("triton", "triton.runtime"):
            patch.setitem(sys.modules, name, None)
        assert "not installed" in str(unavailable(cuda))
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("CC", "cc")
    assert "CUDA devices, the weights are on cpu" in str(unavailable(CPU))
    for capability, expected in (((6, 1), "cuda:0 has compute capability 6.1"), ((7, 0), "None"), ((9, 0), "None")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert str(unavailable(cuda)).startswith(expected)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "C compiler" in str(unavailable(cuda))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in str(unavailable(cuda))


@pytest.mark.parametrize(
    ("gpu", "multiprocessors", "l2_mib", "shared_kib", "expected"),
    [("T4", 40, 4, 64, 4), ("A6000", 84, 6, 100, 4), ("H100", 132, 50, 228, 4), ("none is told", 10, 0, 0, 2)],
)
def test_as_many_programs_as_the_caches_hold(
    monkeypatch: pytest.MonkeyPatch, gpu: str, multiprocessors: int, l2_mib: int, shared_kib: int, expected: int
) -> None:
    told = {"L2_cache_size": l2_mib * 2**20, "shared_memory_per_multiprocessor": shared_kib * 2**10}
    told = {name: size for name, size in told.items() if size}
    properties = SimpleNamespace(multi_processor_count=multiprocessors, **told)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    launch = Launch.choose(128, torch.float32)
    each = launch.programs(10**6, torch.float32, torch.device("cuda")) / multiprocessors
    assert each == expected
    assert expected == 2 or each * launch.columns_bytes(torch.float32) <= max(
        l2_mib * 2**20 / multiprocessors, shared_kib * 2**10
    )
    assert launch.programs(3, torch.float32, torch.device("cuda")) == 3


def test_columns_that_close_up_are_small() -> None:
    for B in (128, 192, 256):
        for dtype in (torch.float32, torch.float64):
            most = Launch.choose(B, dtype).columns_bytes(dtype) / dtype.itemsize
            widths = [-(-(B - step) // 32) * 32 for step in range(B)]
            assert most == max((step + 1) * width for step, width in enumerate(widths))
            assert B**2 / 4 <= most <= B**2 * 3 / 8
    assert Launch.choose(192, torch.float32).columns_bytes(torch.float32) == 48 * 1024


# Compiled, not run


def facts(**spec: Any) -> list[dict[str, Any]]:
    """What compiled kernels take, from a process: late in a long run of tests, the compiler has taken a whole worker down."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks/engine_kernels.py"), json.dumps(spec)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["kernels"]
    return found


def assert_they_fit(found: list[dict[str, Any]]) -> None:
    for row in found:
        # the compiler that comes with torch 2.6 does not quite do it
        spilled, resident = (0, 2) if row["new_triton"] else (64, 1)
        assert row["spilled_bytes"] <= spilled, f"registers are spilled: {row}"
        assert row["resident"] >= resident, f"so many programs fit on a multiprocessor: {row}"
        assert row["shared_bytes"] <= 16 * 1024, row
        assert not row["read_only_loads"], f"scratch must not be read through the read-only cache: {row}"


def test_every_kernel_compiles_without_spills() -> None:
    found = facts(block_sizes=[64, 192], archs=[75, 80, 90], dtypes=["float32"])
    assert [(row["kernel"], row["arch"]) for row in found] == [
        (kernel, arch) for kernel in ("registers", "left-looking") for arch in (75, 80, 90)
    ]
    assert_they_fit(found)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [75, 80, 86, 90])
def test_every_size_and_type_compiles_without_spills(arch: int) -> None:
    both = ["float32", "float64"]
    assert_they_fit(facts(block_sizes=[1, 7, 48, 64, 80, 128, 192, 256, 512], archs=[arch], dtypes=both))
    assert_they_fit(facts(block_sizes=[64], archs=[arch], dtypes=both, in_registers=False))


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "arch", "programs"),
    [(128, 4096, 8, 75, 2), (129, 4096, 8, 90, 1), (96, 4096, 8, 80, 2), (32, 0, 8, 75, 4), (32, 40960, 4, 80, 4)],
)
def test_how_many_programs_are_resident(
    monkeypatch: pytest.MonkeyPatch, registers: int, shared: int, num_warps: int, arch: int, programs: int
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    kernels = importlib.import_module("engine_kernels")
    assert kernels.resident_programs(registers, shared, num_warps, kernels.MULTIPROCESSORS[arch]) == programs


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(
    unavailable(torch.device("cuda")) is not None if torch.cuda.is_available() else True, reason="no GPU"
)
@DTYPES
@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4)], ids=str)
@pytest.mark.parametrize("B", [4, 16, 48, 64, 80, 128, 192, 256])
def test_on_the_gpu(B: int, pattern: Pattern, dtype: torch.dtype) -> None:
    fisher, *given = problem(3, B, dtype)
    many = [t.repeat(500, *[1] * (t.dim() - 1)).cuda() for t in given]  # far more blocks than programs
    for in_registers in (None, False):
        rank, losses = (t.cpu() for t in eliminate_triton(*many, *rule(pattern), in_registers=in_registers))
        assert_is_obs(rank[:3], losses[:3], fisher, given[2], given[3], pattern)
        assert torch.equal(rank, rank[:3].repeat(500, 1)), "no program disturbs another"
        assert torch.equal(losses, losses[:3].repeat(500, 1))
