"""Histograms of scores."""

from __future__ import annotations

import pytest
import torch

from lightning_cap.pruners import CAP, DropAndGrow, FastCAP, Magnitude, Pruner
from lightning_cap.pruners.paths import some_scores
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.saliency import histogram
from lightning_cap.utilities import distributed

INF = float("inf")


def test_logarithms_of_what_is_positive_and_finite() -> None:
    found = histogram(torch.tensor([1e-4, 1e-2, 1e-2, 1.0, 0.0, -1.0, INF, float("nan")]))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((-4.0, 0.0))
    assert (sum(found.counts), found.counts[0], found.counts[32], found.counts[-1]) == (4, 1, 2, 1)
    assert len(found.edges) == len(found.counts) + 1
    assert (found.edges[0], found.edges[-1]) == (found.low, found.high)


def test_scores_that_are_all_the_same_or_none() -> None:
    same = histogram(torch.full((5,), 0.1, dtype=torch.float16))
    assert same is not None
    assert sum(same.counts) == 5
    assert same.low < -1 < same.high
    assert histogram(torch.zeros(3)) is None
    assert histogram(None) is None


def test_scores_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one has no score; the other one has two."""
    answers = iter([(-3.0, 1.0), [1, *[0] * 62, 1]])
    monkeypatch.setattr(distributed, "gather_objects", lambda own: [own, next(answers)])
    found = histogram(torch.empty(0))
    assert found is not None
    assert (found.low, found.high, sum(found.counts)) == (-3.0, 1.0, 2)


def test_a_sample_is_small_and_meets_every_column() -> None:
    scores = torch.arange(64.0).repeat(1000, 1)  # as in blocks, whose losses rise
    ranked = torch.ones_like(scores, dtype=torch.bool)
    some = some_scores(scores, ranked, 1000)
    assert 900 <= len(some) <= 1000
    assert set(some.tolist()) == set(range(64))
    assert len(some_scores(scores, ranked, 64_000)) == 64_000
    ranked[:, 10:] = False
    assert some_scores(scores, ranked, 1000).max() < 10
    assert len(some_scores(scores[:0], ranked[:0], 10)) == 0


@pytest.mark.parametrize(
    "pruner",
    [Magnitude(), CAP(block_size=8, backend="torch"), FastCAP(block_size=8), DropAndGrow()],
    ids=lambda p: type(p).__name__,
)
def test_every_weight_that_is_left_has_a_score(pruner: Pruner) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    targets = Targets({"w": weight})
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[0] = False
    rows = [{"w": torch.randn(32, 8, 8)}]
    with pruner.path(targets, rows, {"w": mask}) as path:
        path.at(0.5)
        scores = path.scores(10**6)
    assert scores is not None
    assert len(scores) == 56
    assert bool((scores >= 0).all())
