from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_cap.errors import GradientError
from lightning_cap.solver import Elimination, linalg
from lightning_cap.sparsity.patterns import NofM, Pattern, Unstructured
from tests.references.obs import best_weights, obs_block
from tests.support.blocks import Eliminate, Reconstruct, assert_is_obs, nearly_singular, order_of, problem

SIZES = [1, 7, 16, 48, 64, pytest.param(192, marks=pytest.mark.slow)]


@pytest.mark.parametrize("B", SIZES)
@pytest.mark.parametrize(
    ("kind", "damp", "use_float64"),
    [("random", 1e-1, False), ("duplicated", 1e-6, True), ("few", 1e-5, True), ("scaled", 1e-4, False)],
)
def test_matches_the_oracle(eliminate: Eliminate, B: int, kind: str, damp: float, use_float64: bool) -> None:
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
def test_same_order_as_the_oracle_where_scores_are_apart(eliminate: Eliminate, kind: str) -> None:
    fisher, weights, alive = problem(kind, 4, 16, seed=3)
    out = eliminate(fisher, weights, alive, 1e-3, Unstructured())
    for k in range(4):
        reference = obs_block(fisher[k].numpy(), weights[k].numpy(), alive[k].numpy(), 1e-3)
        assert order_of(out, k) == reference.order


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("kind", ["random", "few"])
def test_n_of_m_matches_the_oracle(eliminate: Eliminate, n: int, m: int, kind: str) -> None:
    for B in (m, 48):
        fisher, weights, alive = problem(kind, 2, B)
        alive[0, : m - n + 1] = False  # a group that has fewer than n already
        out = eliminate(fisher, weights, alive, 1e-2, NofM(n, m))
        assert_is_obs(out, fisher, weights, alive, (n, m), tol=1e-3)
        kept = alive & (out.rank == B)
        groups = kept.view(2, -1, m).sum(-1)
        assert torch.equal(groups, alive.view(2, -1, m).sum(-1).clamp_max(n))


def test_padding_and_dead_blocks(eliminate: Eliminate, reconstruct: Reconstruct) -> None:
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


def test_zero_fisher_orders_by_magnitude(eliminate: Eliminate, reconstruct: Reconstruct) -> None:
    _, weights, alive = problem("random", 2, 16)
    out = eliminate(torch.zeros(2, 16, 16), weights, alive, 1e-8, Unstructured())
    for k in range(2):
        expected = sorted(alive[k].nonzero().squeeze(1).tolist(), key=lambda i: abs(weights[k, i].item()))
        assert order_of(out, k) == expected
        torch.testing.assert_close(out.losses[k, : len(expected)], 0.5e-8 * weights[k][expected] ** 2)
    pruned = out.rank < 5
    result = reconstruct(torch.zeros(2, 16, 16), weights, alive, pruned, out.damp, out.use_float64)
    assert torch.equal(result, torch.where(alive & ~pruned, weights, 0.0))


def test_zero_weights_go_first_and_for_nothing(eliminate: Eliminate) -> None:
    fisher, weights, alive = problem("random", 2, 16)
    weights[:, ::3] = 0.0
    out = eliminate(fisher, weights, alive, 0.1, Unstructured())
    zeros = (weights == 0) & alive
    assert torch.equal(out.rank < zeros.sum(-1, keepdim=True), zeros)
    everything = torch.zeros_like(weights)
    out = eliminate(fisher, everything, alive, 0.1, Unstructured())
    assert torch.equal(out.steps, alive.sum(-1))
    assert not out.losses[:, :5].any()


def test_small_damp_needs_float64_where_float32_succeeds_and_is_wrong(
    eliminate: Eliminate, monkeypatch: pytest.MonkeyPatch
) -> None:
    fisher = nearly_singular(4, 64)
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


def test_precision_is_chosen_block_by_block(eliminate: Eliminate) -> None:
    good, weights, alive = problem("random", 3, 32)
    fisher = torch.stack([good[0], nearly_singular(1, 32)[0], good[2]])
    out = eliminate(fisher, weights, alive, 1e-4, Unstructured())
    assert out.use_float64.tolist() == [False, True, False]
    alone = eliminate(good[2:], weights[2:], alive[2:], 1e-4, Unstructured())
    assert torch.equal(out.rank[2], alone.rank[0])


def test_indefinite_blocks_get_more_damp_and_are_counted(eliminate: Eliminate, reconstruct: Reconstruct) -> None:
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
def test_never_nan(eliminate: Eliminate, reconstruct: Reconstruct, damp: float, scale: float) -> None:
    fisher, weights, alive = problem("few", 3, 16)
    out = eliminate(scale * fisher, weights, alive, damp, Unstructured())
    assert torch.equal(torch.isfinite(out.losses).sum(-1), alive.sum(-1))
    assert (out.losses >= 0).all()
    for count in (1, 8, 15):
        pruned = (out.rank < count) & alive
        assert reconstruct(scale * fisher, weights, alive, pruned, out.damp, out.use_float64).isfinite().all()


@pytest.mark.parametrize("pattern", [Unstructured(), NofM(2, 4)])
def test_does_not_depend_on_which_blocks_share_a_call(eliminate: Eliminate, pattern: Pattern) -> None:
    fisher, weights, alive = problem("random", 9, 48)
    whole = eliminate(fisher, weights, alive, 0.1, pattern)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = eliminate(fisher[order], weights[order], alive[order], 0.1, pattern)
    assert torch.equal(shuffled.rank, whole.rank[order])
    torch.testing.assert_close(shuffled.losses, whole.losses[order], rtol=1e-4, atol=1e-7)


def test_under_autocast_nothing_changes(eliminate: Eliminate, reconstruct: Reconstruct) -> None:
    fisher, weights, alive = problem("random", 2, 16)
    expected = eliminate(fisher, weights, alive, 0.1, Unstructured())
    args = fisher, weights, alive, alive & (expected.rank < 8), expected.damp, expected.use_float64
    best = reconstruct(*args)
    with torch.autocast("cpu", torch.bfloat16):
        out = eliminate(fisher, weights, alive, 0.1, Unstructured())
        result = reconstruct(*args)
    assert torch.equal(out.losses, expected.losses)
    assert torch.equal(result, best)


def test_equal_scores_go_in_order_of_index(eliminate: Eliminate) -> None:
    fisher = torch.eye(24).expand(2, 24, 24)
    out = eliminate(fisher, torch.ones(2, 24), torch.ones(2, 24, dtype=torch.bool), 1e-3, Unstructured())
    assert torch.equal(out.rank.long(), torch.arange(24).expand(2, 24))


def test_outcomes_of_groups_are_joined(eliminate: Eliminate) -> None:
    fisher, weights, alive = problem("random", 6, 16)
    whole = eliminate(fisher, weights, alive, 0.1, Unstructured())
    groups = [slice(0, 2), slice(2, 2), slice(2, 6)]
    parts = [eliminate(fisher[g], weights[g], alive[g], 0.1, Unstructured()) for g in groups]
    for name in ("rank", "losses", "steps", "damp", "use_float64"):
        assert torch.equal(getattr(Elimination.joined(parts), name), getattr(whole, name))


def test_blocks_that_are_not_finite_are_refused(eliminate: Eliminate) -> None:
    fisher, weights, alive = problem("random", 3, 16)
    fisher[1, 2, 2] = torch.nan
    alive[1] = True
    with pytest.raises(GradientError, match="a block is not finite"):
        eliminate(fisher, weights, alive, 0.1, Unstructured())
