from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import isotonic_regression
from torch import Tensor

from lightning_cap.solver.ranking import (
    _pool_in_rounds,
    at_group_ends,
    block_scores,
    pool_adjacent_violators,
    select,
    smallest,
)
from lightning_cap.utilities import distributed
from tests.support.processes import on_ranks

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


def test_the_two_ways_of_pooling_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 33, generator=generator) ** 2
    values[torch.arange(33) >= torch.randint(0, 34, (50, 1), generator=generator)] = torch.inf
    torch.testing.assert_close(pool_adjacent_violators(values), _pool_in_rounds(values))
    assert pool_adjacent_violators(values.double()).dtype == torch.float32


@given(st.lists(st.lists(LOSS, max_size=12), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_cumulative_scores_are_the_papers(rows: list[list[float]]) -> None:
    scores = block_scores(_padded(rows), "cumulative")
    for score, row in zip(scores, rows, strict=True):
        np.testing.assert_allclose(score[: len(row)].numpy(), np.cumsum(np.array(row, dtype=np.float64)), rtol=1e-6)
        assert torch.isinf(score[len(row) :]).all()
        assert (score[: len(row)].diff() >= 0).all()


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


def test_scores_at_the_end_of_groups_by_hand() -> None:
    inf = math.inf
    rank = torch.tensor(
        [[2, 3, 0, 1], [0, 4, 1, 2], [4, 4, 4, 4]], dtype=torch.int16
    )  # the second lacks one, the third all
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 5.0, 7.0, inf], [inf] * 4])
    expected = torch.tensor([[2.0, 2.0, 4.0, 4.0], [1.0, 7.0, 7.0, inf], [inf] * 4])
    assert torch.equal(at_group_ends(scores, rank, 2), expected)


def _scores() -> Tensor:
    scores = torch.randint(0, 12, (40, 10), generator=torch.Generator().manual_seed(0)).float() / 7
    scores[3:9] = torch.inf
    return scores


def cut_shards() -> list[Tensor]:
    own = _scores().tensor_split(distributed.world_size())[distributed.rank()]
    return [smallest(own, count, sharded=True) for count in (0, 1, 57, 300, 399, 400, 999)]


def test_the_kth_smallest_of_all_ranks(tmp_path: Path) -> None:
    scores = _scores()
    for world in (2, 4):
        parts = on_ranks(world, tmp_path, cut_shards)
        for number, count in enumerate((0, 1, 57, 300, 399, 400, 999)):
            assert torch.equal(torch.cat([part[number] for part in parts]), smallest(scores, count))


def cut_ties() -> Tensor:
    """Two targets, of each of which every rank has two blocks, all of one score; ten entries go."""
    rows = {"a": torch.tensor([0, 1]), "b": torch.tensor([2, 3])}
    return select(torch.ones(4, 3), rows, [(["a", "b"], 10)], sharded=True)


def test_ties_of_targets_that_all_ranks_share_go_by_target_first(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path, cut_ties)
    assert first.sum(-1).tolist() == [3, 3, 0, 0]
    assert second.sum(-1).tolist() == [3, 1, 0, 0]
