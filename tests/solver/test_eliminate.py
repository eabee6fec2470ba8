from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_cap.errors import ConfigError, GradientError
from lightning_cap.solver import Elimination, backend, linalg
from lightning_cap.solver import eliminate as eliminate_with
from lightning_cap.solver import reconstruct as reconstruct_with
from lightning_cap.sparsity.patterns import NofM, Pattern, Unstructured
from tests.references.obs import best_weights, obs_block

BACKEND: list[Any] = ["auto"]


@pytest.fixture(autouse=True, params=["numba", "torch"])
def _with_each_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "BACKEND", [request.param])


def eliminate(*args: Any) -> Elimination:
    return eliminate_with(*args, backend=BACKEND[0])


def reconstruct(*args: Any) -> Tensor:
    return reconstruct_with(*args, backend=BACKEND[0])


def problem(kind: str, K: int, B: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Fisher ``(K, B, B)`` float32, weights ``(K, B)``, alive ``(K, B)`` with some masked entries."""
    generator = torch.Generator().manual_seed(1000 * B + seed)
    n = max(2, B // 4) if kind == "few" else 4 * B + 4
    mix = torch.eye(B, dtype=torch.float64) + 0.5 * torch.randn(B, B, generator=generator, dtype=torch.float64) / B**0.5
    rows = torch.randn(K, n, B, generator=generator, dtype=torch.float64) @ mix
    if kind == "scaled":  # the Fisher then spans eight orders of magnitude
        rows = rows * torch.logspace(-2, 2, B, dtype=torch.float64)[torch.randperm(B, generator=generator)]
    if kind == "duplicated":
        rows[..., B // 2 :] = rows[..., : B - B // 2]
    fisher = (rows.mT @ rows / n).float()
    weights = torch.randn(K, B, generator=generator)
    alive = torch.rand(K, B, generator=generator) > 0.1
    return (fisher + fisher.mT) / 2, weights, alive


def order_of(out: Elimination, block: int) -> list[int]:
    return out.rank[block].argsort(stable=True)[: int(out.steps[block])].tolist()


def assert_is_obs(
    out: Elimination, fisher: Tensor, weights: Tensor, alive: Tensor, nm: tuple[int, int] | None = None, *, tol: float
) -> None:
    """Every removal is the oracle's best up to ``tol``, and costs what the oracle says."""
    for k in range(len(fisher)):
        order = order_of(out, k)
        assert sorted(out.rank[k][out.rank[k] < len(weights[k])].tolist()) == list(range(len(order)))
        reference = obs_block(fisher[k].numpy(), weights[k].numpy(), alive[k].numpy(), float(out.damp[k]), nm, order)
        losses = out.losses[k, : len(order)].double().numpy()
        slack = tol * np.maximum.accumulate(np.append(reference.losses, 0.0))[-1] * 1e-2
        np.testing.assert_allclose(losses, reference.losses, rtol=tol, atol=slack)
        assert (np.array(reference.losses) <= np.array(reference.least) * (1 + tol) + slack).all()
        assert torch.isinf(out.losses[k, len(order) :]).all()
        best = obs_block(fisher[k].numpy(), weights[k].numpy(), alive[k].numpy(), float(out.damp[k]), nm)
        assert float(losses.sum()) == pytest.approx(sum(best.losses), rel=1e-3)


SIZES = [1, 7, 16, 48, 64, pytest.param(192, marks=pytest.mark.slow)]


@pytest.mark.parametrize("B", SIZES)
@pytest.mark.parametrize(
    ("kind", "damp", "use_float64"),
    [("random", 1e-1, False), ("duplicated", 1e-4, True), ("few", 1e-5, True), ("scaled", 1e-4, True)],
)
def test_matches_the_oracle(B: int, kind: str, damp: float, use_float64: bool) -> None:
    K = 1 if B == 192 else 3
    fisher, weights, alive = problem(kind, K, B)
    before = fisher.clone(), weights.clone(), alive.clone()
    out = eliminate(fisher, weights, alive, damp, Unstructured())
    assert out.num_damping_increased == 0
    if B > 7:
        assert bool(out.use_float64.all()) is bool(out.use_float64.any()) is use_float64
    assert torch.equal(out.steps, alive.sum(-1))
    assert_is_obs(out, fisher, weights, alive, tol=1e-5 if use_float64 and B > 7 else 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, (fisher, weights, alive), strict=True))


@pytest.mark.parametrize("kind", ["random", "few", "scaled"])
def test_same_order_as_the_oracle_where_scores_are_apart(kind: str) -> None:
    fisher, weights, alive = problem(kind, 4, 16, seed=3)
    out = eliminate(fisher, weights, alive, 1e-3, Unstructured())
    for k in range(4):
        reference = obs_block(fisher[k].numpy(), weights[k].numpy(), alive[k].numpy(), 1e-3)
        assert order_of(out, k) == reference.order


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("kind", ["random", "few"])
def test_n_of_m_matches_the_oracle(n: int, m: int, kind: str) -> None:
    for B in (m, 48):
        fisher, weights, alive = problem(kind, 2, B)
        alive[0, : m - n + 1] = False  # a group that has fewer than n already
        out = eliminate(fisher, weights, alive, 1e-2, NofM(n, m))
        assert_is_obs(out, fisher, weights, alive, (n, m), tol=1e-3)
        kept = alive & (out.rank == B)
        groups = kept.view(2, -1, m).sum(-1)
        assert torch.equal(groups, alive.view(2, -1, m).sum(-1).clamp_max(n))


def test_padding_and_dead_blocks() -> None:
    fisher, weights, alive = problem("random", 4, 16)
    alive[1] = False
    alive[2, 3:] = False
    weights[~alive] = 1e9  # whatever is there must not count
    fisher[~alive] = 1e9
    fisher.mT[~alive] = 1e9
    out = eliminate(fisher, weights, alive, 0.1, Unstructured())
    assert out.steps.tolist() == alive.sum(-1).tolist()
    assert (out.rank[~alive] == 16).all()
    assert_is_obs(out, fisher, weights, alive, tol=1e-3)
    half = out.rank < out.steps.unsqueeze(-1) // 2
    result = reconstruct(fisher, weights, alive, half, out.damp, out.use_float64)
    assert not result[~alive].any()
    for k in range(4):
        A = alive[k].nonzero().squeeze(1)
        best = best_weights(fisher[k][A][:, A].numpy(), weights[k][A].numpy(), ~half[k][A].numpy(), 0.1)
        np.testing.assert_allclose(result[k][A].numpy(), best, rtol=1e-3, atol=1e-5)


def test_zero_fisher_orders_by_magnitude() -> None:
    _, weights, alive = problem("random", 2, 16)
    out = eliminate(torch.zeros(2, 16, 16), weights, alive, 1e-8, Unstructured())
    for k in range(2):
        expected = sorted(alive[k].nonzero().squeeze(1).tolist(), key=lambda i: abs(weights[k, i].item()))
        assert order_of(out, k) == expected
        torch.testing.assert_close(out.losses[k, : len(expected)], 0.5e-8 * weights[k][expected] ** 2)
    pruned = out.rank < 5
    result = reconstruct(torch.zeros(2, 16, 16), weights, alive, pruned, out.damp, out.use_float64)
    assert torch.equal(result, torch.where(alive & ~pruned, weights, 0.0))


def test_zero_weights_go_first_and_for_nothing() -> None:
    fisher, weights, alive = problem("random", 2, 16)
    weights[:, ::3] = 0.0
    out = eliminate(fisher, weights, alive, 0.1, Unstructured())
    zeros = (weights == 0) & alive
    assert torch.equal(out.rank < zeros.sum(-1, keepdim=True), zeros)
    everything = torch.zeros_like(weights)
    out = eliminate(fisher, everything, alive, 0.1, Unstructured())
    assert torch.equal(out.steps, alive.sum(-1))
    assert not out.losses[:, :5].any()


# Precision


def _nearly_singular(K: int, B: int) -> Tensor:
    """Large gradients along few directions: eigenvalues from 1e3 to 1e-4, in no basis of the weights."""
    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(K, B, B, generator=generator, dtype=torch.float64))[0]
    fisher = ((basis * torch.logspace(3, -4, B, dtype=torch.float64)) @ basis.mT).float()
    return (fisher + fisher.mT) / 2


def test_small_damp_needs_float64_where_float32_succeeds_and_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    fisher = _nearly_singular(4, 64)
    weights = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    alive = torch.ones(4, 64, dtype=torch.bool)
    references = [obs_block(fisher[k].numpy(), weights[k].numpy(), alive[k].numpy(), 1e-8) for k in range(4)]
    losses = torch.tensor([reference.losses for reference in references], dtype=torch.float64)

    def largest_error(out: Elimination) -> float:
        return float(((out.losses.double() - losses).abs() / losses).max())

    out = eliminate(fisher, weights, alive, 1e-8, Unstructured())
    assert out.use_float64.all()
    assert out.num_damping_increased == 0
    assert [order_of(out, k) for k in range(4)] == [reference.order for reference in references]
    assert largest_error(out) < 1e-5

    monkeypatch.setattr(linalg, "FLOAT32_CONDITION", float("inf"))
    forced = eliminate(fisher, weights, alive, 1e-8, Unstructured())
    assert not forced.use_float64.any(), "float32 factors these blocks without complaint"
    assert largest_error(forced) > 1e-2


def test_precision_is_chosen_block_by_block() -> None:
    good, weights, alive = problem("random", 3, 32)
    fisher = torch.stack([good[0], _nearly_singular(1, 32)[0], good[2]])
    out = eliminate(fisher, weights, alive, 1e-3, Unstructured())
    assert out.use_float64.tolist() == [False, True, False]
    alone = eliminate(good[2:], weights[2:], alive[2:], 1e-3, Unstructured())
    assert torch.equal(out.rank[2], alone.rank[0])


def test_indefinite_blocks_get_more_damp_and_are_counted() -> None:
    good, weights, alive = problem("random", 3, 16)
    generator = torch.Generator().manual_seed(0)
    rows = 1e6 * torch.randn(3, 16, generator=generator)  # three gradients: rank 3, and rounding of about 1e5
    fisher = torch.stack([good[0], rows.T @ rows, good[2]])
    assert torch.linalg.eigvalsh(fisher[1].double())[0] < -1
    out = eliminate(fisher, weights, alive, 1e-2, Unstructured())
    assert out.num_damping_increased == 1
    assert (out.damp == 1e-2).tolist() == [True, False, True]
    raised = np.log10(float(out.damp[1]) / 1e-2)
    assert abs(raised - round(raised)) < 1e-9
    assert 1 < float(out.damp[1]) < 1e9
    assert out.use_float64.tolist() == [False, True, False]
    assert_is_obs(out, fisher, weights, alive, tol=1e-3)
    result = reconstruct(fisher, weights, alive, out.rank < 8, out.damp, out.use_float64)
    assert result.isfinite().all()
    assert not result[(out.rank < 8) | ~alive].any()


@pytest.mark.parametrize("damp", [1e-8, 1e-4])
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e12])
def test_never_nan(damp: float, scale: float) -> None:
    fisher, weights, alive = problem("few", 3, 16)
    out = eliminate(scale * fisher, weights, alive, damp, Unstructured())
    assert torch.equal(torch.isfinite(out.losses).sum(-1), alive.sum(-1))
    assert (out.losses >= 0).all()
    for count in (1, 8, 15):
        pruned = (out.rank < count) & alive
        assert reconstruct(scale * fisher, weights, alive, pruned, out.damp, out.use_float64).isfinite().all()


# Reconstruction


@pytest.mark.parametrize("kind", ["random", "few", "duplicated", "scaled"])
@pytest.mark.parametrize("B", [1, 7, 48])
def test_every_prefix_is_the_textbook_state_and_the_best_there_is(kind: str, B: int) -> None:
    fisher, weights, alive = problem(kind, 2, B)
    out = eliminate(fisher, weights, alive, 1e-3, Unstructured())
    orders = [order_of(out, k) for k in range(2)]
    references = [
        obs_block(fisher[k].numpy(), weights[k].numpy(), alive[k].numpy(), 1e-3, order=orders[k]) for k in range(2)
    ]
    for count in range(0, B + 1, max(1, B // 8)):
        pruned = alive & (out.rank < count)
        result = reconstruct(fisher, weights, alive, pruned, out.damp, out.use_float64)
        for k in range(2):
            sequential = references[k].weights[min(count, len(orders[k]))]
            scale = np.abs(sequential).max() + 1.0
            np.testing.assert_allclose(result[k].numpy(), sequential, rtol=1e-3, atol=1e-3 * scale)
            A = alive[k].nonzero().squeeze(1).numpy()
            best = best_weights(fisher[k].numpy()[np.ix_(A, A)], weights[k].numpy()[A], ~pruned[k].numpy()[A], 1e-3)
            np.testing.assert_allclose(result[k].numpy()[A], best, rtol=1e-3, atol=1e-4 * scale)
        assert not result[pruned | ~alive].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "few"])
def test_untouched_blocks_are_returned_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    fisher, weights, alive = problem(kind, 3, 16)
    weights = weights.to(dtype) + torch.randn(3, 16, dtype=dtype) / 7
    out = eliminate(fisher, weights.float(), alive, 1e-3, Unstructured())
    pruned = alive & (out.rank < 6)
    pruned[1] = False
    result = reconstruct(fisher, weights, alive, pruned, out.damp, out.use_float64)
    assert result.dtype == dtype
    assert torch.equal(result[1], torch.where(alive[1], weights[1], 0.0))
    assert not torch.equal(result[0], torch.where(alive[0] & ~pruned[0], weights[0], 0.0))
    everything = reconstruct(fisher, weights, alive, alive, out.damp, out.use_float64)
    assert not everything.any()


# The rest


@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4)])
def test_does_not_depend_on_which_blocks_share_a_call(pattern: Pattern) -> None:
    fisher, weights, alive = problem("random", 9, 48)
    whole = eliminate(fisher, weights, alive, 0.1, pattern)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = eliminate(fisher[order], weights[order], alive[order], 0.1, pattern)
    assert torch.equal(shuffled.rank, whole.rank[order])
    torch.testing.assert_close(shuffled.losses, whole.losses[order], rtol=1e-4, atol=1e-7)


def test_chunks_and_progress(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_under_autocast_nothing_changes() -> None:
    fisher, weights, alive = problem("random", 2, 16)
    expected = eliminate(fisher, weights, alive, 0.1, Unstructured())
    args = fisher, weights, alive, alive & (expected.rank < 8), expected.damp, expected.use_float64
    best = reconstruct(*args)
    with torch.autocast("cpu", torch.bfloat16):
        out = eliminate(fisher, weights, alive, 0.1, Unstructured())
        result = reconstruct(*args)
    assert torch.equal(out.losses, expected.losses)
    assert torch.equal(result, best)


# Backends


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


def test_equal_scores_go_in_order_of_index() -> None:
    fisher = torch.eye(24).expand(2, 24, 24)
    out = eliminate(fisher, torch.ones(2, 24), torch.ones(2, 24, dtype=torch.bool), 1e-3, Unstructured())
    assert torch.equal(out.rank.long(), torch.arange(24).expand(2, 24))


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


def test_outcomes_of_groups_are_joined() -> None:
    fisher, weights, alive = problem("random", 6, 16)
    whole = eliminate(fisher, weights, alive, 0.1, Unstructured())
    groups = [slice(0, 2), slice(2, 2), slice(2, 6)]
    parts = [eliminate(fisher[g], weights[g], alive[g], 0.1, Unstructured()) for g in groups]
    for name in ("rank", "losses", "steps", "damp", "use_float64"):
        assert torch.equal(getattr(Elimination.joined(parts), name), getattr(whole, name))


def test_out_of_memory_halves_the_chunk(caplog: pytest.LogCaptureFixture) -> None:
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


_TWO_THREADS = """
import torch
from lightning_cap.sparsity import Unstructured
from lightning_cap.solver import eliminate, reconstruct
torch.set_num_threads(2)
rows = torch.randn(64, 400, 192)
fisher, alive, weights = rows.mT @ rows / 400, torch.ones(64, 192, dtype=torch.bool), torch.randn(64, 192)
for damp in (1.0, 1e-6):
    for backend in ("numba", "torch"):
        out = eliminate(fisher, weights, alive, damp, Unstructured(), backend=backend)
        reconstruct(fisher, weights, alive, out.rank < 96, out.damp, out.use_float64, backend=backend)
print("finished", bool(out.use_float64.any()))
"""


def test_large_blocks_finish_under_two_threads() -> None:
    """Batched inv, lu and solve hang in MKL there (n >= 160)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _TWO_THREADS], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.startswith("finished")


_FORK = """
import multiprocessing, torch, types
from concurrent.futures import ThreadPoolExecutor
from lightning_cap.sparsity import Unstructured
from lightning_cap.kernels.cpu import threads
from lightning_cap.solver import eliminate
rows = torch.randn(20, 64, 16)
args = rows.mT @ rows / 64, torch.randn(20, 16), torch.ones(20, 16, dtype=torch.bool), 0.1, Unstructured()
expected = eliminate(*args, backend="numba").rank
def child(pipe):
    torch.set_num_threads(1)  # as forked workers of a DataLoader do: torch's own OpenMP does not live after a fork
    threads.torch = types.SimpleNamespace(get_num_threads=lambda: 2)
    pipe.send(torch.equal(eliminate(*args, backend="numba").rank, expected))
ours, theirs = multiprocessing.get_context("fork").Pipe()
process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,), daemon=True)
process.start()
assert ours.poll(60) and ours.recv() is True
process.join()
assert process.exitcode == 0
with ThreadPoolExecutor(4) as pool:
    ranks = list(pool.map(lambda _: eliminate(*args, backend="numba").rank, range(8)))
assert all(torch.equal(rank, expected) for rank in ranks)
print("lived")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_compiled_solver_lives_in_forked_children_and_in_threads() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _FORK], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout == "lived\n", done.stderr


def test_blocks_that_are_not_finite_are_refused() -> None:
    fisher, weights, alive = problem("random", 3, 16)
    fisher[1, 2, 2] = torch.nan
    alive[1] = True
    with pytest.raises(GradientError, match="a block is not finite"):
        eliminate(fisher, weights, alive, 0.1, Unstructured())


def test_reconstruction_of_indefinite_blocks_raises_the_damp() -> None:
    _, weights, alive = problem("random", 2, 16)
    fisher = torch.eye(16).repeat(2, 1, 1)
    fisher[0, 0, 0] = -5.0
    alive[:] = True
    pruned = torch.zeros_like(alive)
    pruned[:, 8:] = True
    damp = torch.full((2,), 1e-2, dtype=torch.float64)
    result = reconstruct(fisher, weights, alive, pruned, damp, torch.zeros(2, dtype=torch.bool))
    assert torch.equal(result, torch.where(pruned, 0.0, weights)), "nothing is correlated"
