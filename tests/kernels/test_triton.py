"""The Triton kernels: run by Triton's interpreter on the CPU, compiled for two GPUs, run for real where there is one."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
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
    matrix = restrict(fisher, alive, torch.zeros(len(fisher)))
    inverse = torch.stack([torch.cholesky_inverse(torch.linalg.cholesky(block)) for block in matrix])
    return inverse.to(dtype), matrix.diagonal(dim1=-2, dim2=-1).reciprocal().to(dtype)


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


# Compiled, not run

Compiled = tuple[bytes, str, int]  # machine code, PTX, bytes of shared memory

CASES = [  # of those that are not slow, one for each kernel, type and GPU
    pytest.param(B, dtype, in_registers, arch, marks=() if (B, arch) in ((48, 80), (192, 90)) else pytest.mark.slow)
    for arch in (80, 90)
    for B in (1, 7, 48, 64, 80, 128, 192, 512)
    for dtype in (torch.float32, torch.float64)
    for in_registers in ((None, False) if B == 64 else (None,))
]


@pytest.fixture(scope="module")
def compiler() -> Iterator[Callable[..., Compiled]]:
    """`compiled` in a process of its own: late in a long run of tests, the compiler has taken the whole worker down with it."""
    pytest.importorskip("triton", reason="triton is not installed")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda *args: pool.submit(compiled, *args).result()


def is_new() -> bool:
    """Whether it is a triton later than 3.2, which comes with torch 2.6."""
    from triton.compiler import ASTSource

    return "constexprs" in inspect.signature(ASTSource).parameters


def compiled(launch: Launch, dtype: torch.dtype, arch: int, cache: str) -> Compiled:
    """The kernel as `eliminate_triton` has it compiled when a GPU of this ``arch`` is there."""
    os.environ["TRITON_CACHE_DIR"] = cache
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_cap.kernels import triton as kernels

    kernel = kernels.eliminate_in_registers if launch.in_registers else kernels.eliminate_left_looking
    number = "*fp32" if dtype == torch.float32 else "*fp64"
    types = {"alive": "*u8", "rank": "*i32", "blocks": "i32", "group": "i32", "keep": "i32"}
    signature = {
        name: "constexpr" if name in launch.constants else types.get(name, number) for name in kernel.arg_names
    }
    aligned: Any = {
        (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    options = {"num_warps": launch.num_warps, "num_stages": 1, "enable_fp_fusion": True}
    if not is_new():
        from triton.backends.compiler import AttrsDescriptor

        signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        properties = {"tt.divisibility": [i for (i,) in aligned], "tt.equal_to": []}
        aligned = AttrsDescriptor.from_dict({"arg_properties": properties, "cls": AttrsDescriptor.__name__})
    source = ASTSource(kernel, signature, dict(launch.constants), aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return kernel.asm["cubin"], kernel.asm["ptx"], kernel.metadata.shared


@pytest.mark.parametrize(("B", "dtype", "in_registers", "arch"), CASES, ids=str)
def test_compiles_without_spills(
    compiler: Callable[..., Compiled], B: int, dtype: torch.dtype, in_registers: bool | None, arch: int, tmp_path: Path
) -> None:
    triton = pytest.importorskip("triton", reason="triton is not installed")
    launch = Launch.choose(B, dtype, in_registers)
    cubin, ptx, shared = compiler(launch, dtype, arch, str(tmp_path / "cache"))
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", "kernel.cubin"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    print(launch, f"sm_{arch}", found, f"shared={shared}")
    most, programs = (0, 2) if is_new() else (16, 1)  # bytes; the older compiler does not quite do it
    assert found["STACK"] + found["LOCAL"] <= most, "registers are spilled"
    assert found["REG"] * launch.num_warps * 32 <= 65536 // programs, "so many programs fit on a multiprocessor"
    assert shared <= 16 * 1024
    assert ".nc." not in ptx, "scratch must not be read through the read-only cache"


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(
    unavailable(torch.device("cuda")) is not None if torch.cuda.is_available() else True, reason="no GPU"
)
@DTYPES
@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4)], ids=str)
@pytest.mark.parametrize("B", [4, 16, 48, 64, 80, 128, 192])
def test_on_the_gpu(B: int, pattern: Pattern, dtype: torch.dtype) -> None:
    fisher, *given = problem(3, B, dtype)
    many = [t.repeat(500, *[1] * (t.dim() - 1)).cuda() for t in given]  # far more blocks than programs
    for in_registers in (None, False):
        rank, losses = (t.cpu() for t in eliminate_triton(*many, *rule(pattern), in_registers=in_registers))
        assert_is_obs(rank[:3], losses[:3], fisher, given[2], given[3], pattern)
        assert torch.equal(rank, rank[:3].repeat(500, 1)), "no program disturbs another"
        assert torch.equal(losses, losses[:3].repeat(500, 1))
