from __future__ import annotations

import multiprocessing
import os
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_cap.errors import ConfigError
from lightning_cap.kernels.cpu import threads
from lightning_cap.solver import backend
from lightning_cap.solver import eliminate as eliminate_with
from lightning_cap.solver import reconstruct as reconstruct_with
from lightning_cap.sparsity.patterns import NofM, Pattern, Unstructured
from tests.support.blocks import Eliminate, Reconstruct, order_of, problem
from tests.support.processes import in_fresh_process


@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4)])
@pytest.mark.parametrize("kind", ["random", "few", "scaled"])
def test_backends_agree(kind: str, pattern: Pattern) -> None:
    fisher, weights, alive = problem(kind, 5, 48)
    compiled, plain = (eliminate_with(fisher, weights, alive, 1e-2, pattern, backend=b) for b in ("numba", "torch"))
    assert torch.equal(compiled.steps, plain.steps)
    assert torch.equal(compiled.use_float64, plain.use_float64)
    assert (compiled.rank == plain.rank).float().mean() > 0.95  # ties by rounding may swap two
    total = [torch.where(torch.isfinite(e.losses), e.losses, 0.0).sum() for e in (compiled, plain)]
    torch.testing.assert_close(*total, rtol=1e-3, atol=0)
    pruned = alive & (compiled.rank < 24)
    given = fisher, weights, alive, pruned, compiled.damp, compiled.use_float64
    torch.testing.assert_close(
        reconstruct_with(*given, backend="numba"), reconstruct_with(*given, backend="torch"), rtol=1e-3, atol=1e-4
    )


@dataclass(frozen=True)
class EvenFirst(Pattern):
    """A pattern of a user, which no compiled backend knows."""

    @property
    def group_size(self) -> int:
        return 1

    @property
    def sparsity(self) -> None:
        return None

    def removable(self, alive: Tensor) -> Tensor:
        even = alive & (torch.arange(alive.shape[-1]) % 2 == 0)
        return torch.where(even.any(-1, keepdim=True), even, alive)

    def is_satisfied(self, kept: Tensor) -> bool:
        return True


def test_choice_of_backend() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    choose = backend.choose_backend
    assert choose("auto", cpu, Unstructured()) == "numba"
    assert choose("auto", cpu, EvenFirst()) == "torch"
    assert choose("torch", cuda, NofM()) == "torch"
    with pytest.raises(ConfigError, match=r"backend='numba' does not know the pattern EvenFirst.*backend='auto'"):
        choose("numba", cpu, EvenFirst())
    with pytest.raises(ConfigError, match="runs on the CPU, the weights are on cuda:0"):
        choose("numba", cuda, Unstructured())
    with pytest.raises(ConfigError, match="backend='cuda'"):
        choose("cuda", cpu, Unstructured())  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="backend='triton' cannot run: "):
            choose("triton", cpu, Unstructured())


def test_a_pattern_of_ones_own() -> None:
    fisher, weights, alive = problem("random", 2, 16)
    out = eliminate_with(fisher, weights, alive, 0.1, EvenFirst())
    for k in range(2):
        odd = [i % 2 for i in order_of(out, k)]
        assert odd == sorted(odd)
        assert len(odd) == alive[k].sum()


def test_chunks_and_progress(eliminate: Eliminate, reconstruct: Reconstruct, monkeypatch: pytest.MonkeyPatch) -> None:
    fisher, weights, alive = problem("random", 7, 16)
    alive[4] = False
    whole = eliminate(fisher, weights, alive, 0.1, Unstructured())
    monkeypatch.setattr(backend, "_CPU_FLOATS", 2 * 16**2)
    seen: list[tuple[str, int, int]] = []
    pieces = eliminate(fisher, weights, alive, 0.1, Unstructured(), lambda *args: seen.append(args))
    assert seen == [("solve", 2, 6), ("solve", 4, 6), ("solve", 6, 6)]
    assert torch.equal(pieces.rank, whole.rank)
    result = reconstruct(fisher, weights, alive, alive & (pieces.rank < 8), pieces.damp, pieces.use_float64)
    assert torch.equal((result != 0).sum(-1), (alive.sum(-1) - 8).clamp_min(0))


def test_out_of_memory_halves_the_chunk(
    eliminate: Eliminate, reconstruct: Reconstruct, caplog: pytest.LogCaptureFixture
) -> None:
    fisher, weights, alive = problem("random", 10, 16)

    class Scarce:
        """Blocks of which no more than three fit."""

        def __init__(self) -> None:
            self.asked: list[int] = []

        def __getitem__(self, index: Tensor) -> Tensor:
            self.asked.append(len(index))
            if len(index) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return fisher[index]

    whole = eliminate(fisher, weights, alive, 0.1, Unstructured())
    scarce = Scarce()
    out = eliminate(scarce, weights, alive, 0.1, Unstructured())
    assert torch.equal(out.rank, whole.rank)
    assert max(scarce.asked) == 10, "tried in one first"
    assert [n for n in scarce.asked if n <= 3] == scarce.asked[-sum(n <= 3 for n in scarce.asked) :]
    assert "Out of memory in the solver; going on with chunks of" in caplog.text
    pruned = alive & (out.rank < 8)
    expected = reconstruct(fisher, weights, alive, pruned, out.damp, out.use_float64)
    torch.testing.assert_close(reconstruct(Scarce(), weights, alive, pruned, out.damp, out.use_float64), expected)

    class Full(Scarce):
        def __getitem__(self, index: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        eliminate(Full(), weights, alive, 0.1, Unstructured())

    class Broken(Scarce):
        def __getitem__(self, index: Tensor) -> Tensor:
            raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        eliminate(Broken(), weights, alive, 0.1, Unstructured())


def _solve_large_blocks() -> list[bool]:
    """Whether blocks of each kind needed float64."""
    torch.set_num_threads(2)
    rows = torch.randn(24, 400, 192, generator=torch.Generator().manual_seed(0))
    fisher, alive, weights = rows.mT @ rows / 400, torch.ones(24, 192, dtype=torch.bool), torch.randn(24, 192)
    found = []
    for damp in (1.0, 1e-8):
        fisher[:, :, 0] *= damp**0.5
        fisher[:, 0] *= damp**0.5
        for name in ("numba", "torch"):
            out = eliminate_with(fisher, weights, alive, damp, Unstructured(), backend=name)
            moved = reconstruct_with(fisher, weights, alive, out.rank < 96, out.damp, out.use_float64, backend=name)
            assert moved.isfinite().all()
            assert bool(out.use_float64.all()) is bool(out.use_float64.any())
            found.append(bool(out.use_float64.any()))
    return found


@pytest.mark.slow
def test_large_blocks_finish_under_two_threads(tmp_path: Path) -> None:
    """Batched inv, lu and solve hang in MKL there (n >= 160)."""
    assert in_fresh_process(tmp_path, _solve_large_blocks) == [False, False, True, True]


def _solve_in_a_child_and_in_threads() -> None:
    rows = torch.randn(20, 64, 16, generator=torch.Generator().manual_seed(0))
    args = rows.mT @ rows / 64, torch.randn(20, 16), torch.ones(20, 16, dtype=torch.bool), 0.1, Unstructured()
    expected = eliminate_with(*args, backend="numba").rank
    torch.set_num_threads(2)
    assert torch.equal(eliminate_with(*args, backend="numba").rank, expected), "in two threads"

    def child(pipe: Any) -> None:
        torch.set_num_threads(1)  # as forked workers of a DataLoader do: torch's own OpenMP does not live after a fork
        threads.torch = types.SimpleNamespace(get_num_threads=lambda: 2)
        pipe.send(torch.equal(eliminate_with(*args, backend="numba").rank, expected))

    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=child, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(60)
    assert ours.recv() is True
    process.join()
    assert process.exitcode == 0
    with ThreadPoolExecutor(4) as pool:
        ranks = list(pool.map(lambda _: eliminate_with(*args, backend="numba").rank, range(8)))
    assert all(torch.equal(rank, expected) for rank in ranks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_compiled_solver_lives_in_forked_children_and_in_threads(tmp_path: Path) -> None:
    in_fresh_process(tmp_path, _solve_in_a_child_and_in_threads)
