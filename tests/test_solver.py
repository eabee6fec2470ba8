from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from reference_obs import best_weights, obs_block
from torch import Tensor

from lightning_cap import linalg
from lightning_cap.patterns import NofM, Pattern, Unstructured
from lightning_cap.solver import Elimination, eliminate, reconstruct


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
    ("kind", "damp", "precise"),
    [("random", 1e-1, False), ("duplicated", 1e-4, True), ("few", 1e-5, True), ("scaled", 1e-4, True)],
)
def test_matches_the_oracle(B: int, kind: str, damp: float, precise: bool) -> None:
    K = 1 if B == 192 else 3
    fisher, weights, alive = problem(kind, K, B)
    before = fisher.clone(), weights.clone(), alive.clone()
    out = eliminate(fisher, weights, alive, damp, Unstructured())
    assert out.num_redamped == 0
    if B > 7:
        assert bool(out.precise.all()) is bool(out.precise.any()) is precise
    assert torch.equal(out.steps, alive.sum(-1))
    assert_is_obs(out, fisher, weights, alive, tol=1e-5 if precise and B > 7 else 1e-3)
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
    result = reconstruct(fisher, weights, alive, half, out.damp, out.precise)
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
    result = reconstruct(torch.zeros(2, 16, 16), weights, alive, pruned, out.damp, out.precise)
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

    out = eliminate(fisher, weights, alive, 1e-8, Unstructured())
    assert out.precise.all()
    assert out.num_redamped == 0
    assert [order_of(out, k) for k in range(4)] == [reference.order for reference in references]

    monkeypatch.setattr(linalg, "FLOAT32_CONDITION", float("inf"))
    forced = eliminate(fisher, weights, alive, 1e-8, Unstructured())
    assert not forced.precise.any(), "float32 factors these blocks without complaint"
    assert [order_of(forced, k) for k in range(4)] != [reference.order for reference in references]


def test_precision_is_chosen_block_by_block() -> None:
    good, weights, alive = problem("random", 3, 32)
    fisher = torch.stack([good[0], _nearly_singular(1, 32)[0], good[2]])
    out = eliminate(fisher, weights, alive, 1e-3, Unstructured())
    assert out.precise.tolist() == [False, True, False]
    alone = eliminate(good[2:], weights[2:], alive[2:], 1e-3, Unstructured())
    assert torch.equal(out.rank[2], alone.rank[0])


def test_indefinite_blocks_get_more_damp_and_are_counted() -> None:
    good, weights, alive = problem("random", 3, 16)
    generator = torch.Generator().manual_seed(0)
    rows = 1e6 * torch.randn(3, 16, generator=generator)  # three gradients: rank 3, and rounding of about 1e5
    fisher = torch.stack([good[0], rows.T @ rows, good[2]])
    assert torch.linalg.eigvalsh(fisher[1].double())[0] < -1
    out = eliminate(fisher, weights, alive, 1e-2, Unstructured())
    assert out.num_redamped == 1
    assert (out.damp == 1e-2).tolist() == [True, False, True]
    raised = np.log10(float(out.damp[1]) / 1e-2)
    assert abs(raised - round(raised)) < 1e-9
    assert 1 < float(out.damp[1]) < 1e9
    assert out.precise.tolist() == [False, True, False]
    assert_is_obs(out, fisher, weights, alive, tol=1e-3)
    result = reconstruct(fisher, weights, alive, out.rank < 8, out.damp, out.precise)
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
        assert reconstruct(scale * fisher, weights, alive, pruned, out.damp, out.precise).isfinite().all()


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
        result = reconstruct(fisher, weights, alive, pruned, out.damp, out.precise)
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
    result = reconstruct(fisher, weights, alive, pruned, out.damp, out.precise)
    assert result.dtype == dtype
    assert torch.equal(result[1], torch.where(alive[1], weights[1], 0.0))
    assert not torch.equal(result[0], torch.where(alive[0] & ~pruned[0], weights[0], 0.0))
    everything = reconstruct(fisher, weights, alive, alive, out.damp, out.precise)
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
    for file in ("eliminate", "reconstruct"):  # the package exports functions of the same names
        monkeypatch.setattr(importlib.import_module(f"lightning_cap.solver.{file}"), "_CHUNK_FLOATS", 2 * 16**2)
    seen: list[tuple[str, int, int]] = []
    pieces = eliminate(fisher, weights, alive, 0.1, Unstructured(), lambda *args: seen.append(args))
    assert seen == [("solve", 2, 6), ("solve", 4, 6), ("solve", 6, 6)]
    assert torch.equal(pieces.rank, whole.rank)
    result = reconstruct(fisher, weights, alive, alive & (pieces.rank < 8), pieces.damp, pieces.precise)
    assert torch.equal((result != 0).sum(-1), (alive.sum(-1) - 8).clamp_min(0))


def test_under_autocast_nothing_changes() -> None:
    fisher, weights, alive = problem("random", 2, 16)
    expected = eliminate(fisher, weights, alive, 0.1, Unstructured())
    args = fisher, weights, alive, alive & (expected.rank < 8), expected.damp, expected.precise
    best = reconstruct(*args)
    with torch.autocast("cpu", torch.bfloat16):
        out = eliminate(fisher, weights, alive, 0.1, Unstructured())
        result = reconstruct(*args)
    assert torch.equal(out.losses, expected.losses)
    assert torch.equal(result, best)
