from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import isotonic_regression

from lightning_cap.allocation import Global, Uniform, budget_of
from lightning_cap.ranking import _pool_in_rounds, block_scores, pool_adjacent_violators, smallest

LOSS = st.one_of(
    st.floats(0, 10, width=32, allow_subnormal=False),
    st.sampled_from([0.0, 1.0, 2.0, 1e-12, 1e12]),
)


def _padded(rows: list[list[float]]) -> torch.Tensor:
    """Rows of finite losses -> ``(K, B)``, infinite past their ends."""
    B = max([len(row) for row in rows] + [1])
    return torch.tensor([row + [math.inf] * (B - len(row)) for row in rows])


def _envelope_slopes(losses: list[float]) -> list[float]:
    """Slopes of the lower convex envelope of the points (t, sum of the first t losses), a slope a step."""
    points = [(0, 0.0), *enumerate(np.cumsum(np.array(losses, dtype=np.float64)).tolist(), start=1)]
    slopes: list[float] = []
    at = 0
    while at < len(losses):
        x, y = points[at]
        slope, end = min(((q - y) / (p - x), -p) for p, q in points[at + 1 :])
        slopes += [slope] * (-end - at)
        at = -end
    return slopes


# Scores


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(LOSS, max_size=12), min_size=1, max_size=5))
def test_marginal_scores_are_the_isotonic_fit(rows: list[list[float]]) -> None:
    losses = _padded(rows)
    scores = block_scores(losses, "marginal")
    assert scores.shape == losses.shape
    assert scores.dtype == torch.float32
    for score, row in zip(scores, rows, strict=True):
        assert torch.isinf(score[len(row) :]).all()
        finite = score[: len(row)]
        assert finite.isfinite().all()
        assert (finite[1:] >= finite[:-1]).all()
        if row:
            expected = isotonic_regression(np.array(row, dtype=np.float64))
            np.testing.assert_allclose(finite.numpy(), expected, rtol=1e-5, atol=1e-5 * max(row))
            np.testing.assert_allclose(finite.numpy(), _envelope_slopes(row), rtol=1e-5, atol=1e-5 * max(row))


def test_pool_adjacent_violators_by_hand() -> None:
    inf = math.inf
    rows = torch.tensor([[3.0, 1, 2, 5, 4], [5, 4, 3, 2, 1], [1, 2, 3, inf, inf], [inf] * 5, [2, 2, 1, inf, inf]])
    fit = pool_adjacent_violators(rows)
    third = 5 / 3
    expected = [[2, 2, 2, 4.5, 4.5], [3] * 5, [1, 2, 3, inf, inf], [inf] * 5, [third, third, third, inf, inf]]
    torch.testing.assert_close(fit, torch.tensor(expected))
    long = torch.rand(3, 500, generator=torch.Generator().manual_seed(0)).flip(-1)
    for row, values in zip(pool_adjacent_violators(long), long, strict=True):
        np.testing.assert_allclose(row.numpy(), isotonic_regression(values.double().numpy()), rtol=1e-5)


@given(st.lists(st.lists(LOSS, max_size=12), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_cumulative_scores_are_the_papers(rows: list[list[float]]) -> None:
    scores = block_scores(_padded(rows), "cumulative")
    for score, row in zip(scores, rows, strict=True):
        np.testing.assert_allclose(score[: len(row)].numpy(), np.cumsum(np.array(row, dtype=np.float64)), rtol=1e-6)
        assert torch.isinf(score[len(row) :]).all()
        assert (score[: len(row)].diff() >= 0).all()


# Selection


@given(st.lists(st.lists(LOSS, max_size=8), min_size=1, max_size=6), st.integers(0, 50), st.booleans())
@settings(max_examples=150, deadline=None)
def test_selection_is_exact_prefix_and_ties_go_by_block_then_step(
    rows: list[list[float]], count: int, marginal: bool
) -> None:
    scores = block_scores(_padded(rows), "marginal" if marginal else "cumulative")
    count = min(count, sum(len(row) for row in rows))
    chosen = smallest(scores, count)
    assert int(chosen.sum()) == count
    assert torch.equal(chosen, chosen.int().cummin(-1).values.bool())
    expected = torch.zeros(scores.numel(), dtype=torch.bool)
    expected[scores.flatten().argsort(stable=True)[:count]] = True
    assert torch.equal(chosen.flatten(), expected)


def test_all_equal_scores_fill_block_after_block() -> None:
    chosen = smallest(torch.zeros(3, 4), 6)
    assert chosen.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert not smallest(torch.zeros(3, 4), 0).any()
    assert smallest(torch.zeros(3, 4), 12).all()


@given(st.lists(st.lists(LOSS, min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=80, deadline=None)
def test_marginal_ranking_gives_the_least_total_loss(rows: list[list[float]]) -> None:
    curves = [[0.0, *np.cumsum(np.array(row, dtype=np.float64))] for row in rows]
    slopes = [_envelope_slopes(row) for row in rows]
    scores = block_scores(_padded(rows), "marginal")
    scale = max(sum(curve) for curve in curves)
    for count in range(sum(len(row) for row in rows) + 1):
        cut = smallest(scores, count).sum(-1).tolist()
        total = sum(curve[c] for curve, c in zip(curves, cut, strict=True))
        least = min(
            sum(curve[c] for curve, c in zip(curves, cuts, strict=True))
            for cuts in itertools.product(*(range(len(row) + 1) for row in rows))
            if sum(cuts) == count
        )
        # a cut inside a pool lies above the envelope by this much, and at most one pool is cut inside
        above = [curve[c] - sum(slope[:c]) for curve, slope, c in zip(curves, slopes, cut, strict=True)]
        assert sum(a > 1e-5 * scale for a in above) <= 1
        assert total <= least + max(above) + 1e-5 * scale


# Budgets


@pytest.mark.parametrize("numel", [1, 7, 100, 12345, 85_000_001])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.75, 0.9, 0.999])
def test_budget_is_rounded_half_up(sparsity: float, numel: int) -> None:
    assert budget_of(sparsity, numel) == math.floor(sparsity * numel + 0.5)
    assert budget_of(0.5, 5) == 3


TARGETS = st.lists(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=6
)


@given(TARGETS, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_budgets_add_up_and_never_undo_a_zero(targets: list[tuple[int, int]], share: float) -> None:
    sizes = {f"t{i}": n for i, (n, _) in enumerate(targets)}
    existing = {f"t{i}": z for i, (_, z) in enumerate(targets)}
    low, high = sum(existing.values()), sum(sizes.values())
    zeros = low + round(share * (high - low))
    shapes = {name: (size,) for name, size in sizes.items()}
    assert Global().budgets(shapes, existing, zeros) == [(list(sizes), zeros)]
    uniform = Uniform().budgets(shapes, existing, zeros)
    assert [names for names, _ in uniform] == [[name] for name in sizes]
    budgets = {names[0]: count for names, count in uniform}
    assert sum(budgets.values()) == zeros
    assert all(existing[name] <= budgets[name] <= sizes[name] for name in sizes)
    free = [name for name in sizes if budgets[name] > existing[name]]
    level = sum(budgets[n] for n in free) / max(1, sum(sizes[n] for n in free))
    assert all(abs(budgets[name] - level * sizes[name]) < 2 for name in free)
    slack = len(sizes) / max(1, sum(sizes[n] for n in free))  # of the level, by rounding the budgets it is taken from
    assert all(existing[name] > (level - slack) * sizes[name] - 2 for name in sizes if name not in free)


def test_uniform_by_hand() -> None:
    assert Uniform().budgets({"a": (2, 5), "b": (10,), "c": (5, 2)}, {"a": 0, "b": 0, "c": 0}, 16) == [
        (["a"], 6),
        (["b"], 5),
        (["c"], 5),
    ]
    assert Uniform().budgets({"a": (10,), "b": (10,)}, {"a": 8, "b": 0}, 10) == [(["a"], 8), (["b"], 2)]


def test_the_two_ways_of_pooling_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 33, generator=generator) ** 2
    values[torch.arange(33) >= torch.randint(0, 34, (50, 1), generator=generator)] = torch.inf
    torch.testing.assert_close(pool_adjacent_violators(values), _pool_in_rounds(values))
    assert pool_adjacent_violators(values.double()).dtype == torch.float32
