from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_cap.errors import ConfigError, GradientError, PatternError
from lightning_cap.pruners import CAP, Magnitude, RelativeDamp
from lightning_cap.sparsity.patterns import BlockOf, NofM
from lightning_cap.sparsity.targets import Targets
from tests.references.obs import best_weights, obs_block
from tests.support.problems import gradient_rows, random_masks, random_targets, same_result
from tests.support.quadratic import Quadratic

SHAPES = {"a": (6, 8), "conv": (4, 3, 3, 3), "b": (1, 5)}


@pytest.mark.parametrize("ranking", ["marginal", "cumulative"])
@pytest.mark.parametrize("block_size", [1, 7, 24, 200])
@pytest.mark.parametrize("damp", [1e-8, 1e-1])
def test_predicted_loss_is_the_true_one(ranking: Any, block_size: int, damp: float) -> None:
    problem = Quadratic(SHAPES)
    path = CAP(block_size=block_size, damp=damp, ranking=ranking, shrinkage=0.0).path(problem.targets, problem.rows)
    for sparsity in (0.2, 0.5, 0.75, 0.95):
        result = path.at(sparsity)
        assert result.predicted_loss == pytest.approx(problem.increase(result, block_size, damp), rel=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_beats_magnitude_where_weights_are_correlated(seed: int) -> None:
    problem = Quadratic(SHAPES, seed=seed)
    cap = CAP(block_size=200, damp=1e-6, shrinkage=0.0).path(problem.targets, problem.rows)
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


@pytest.mark.parametrize("pattern", [None, BlockOf(2)])
def test_auto_has_the_results_of_both_rankings(pattern: Any) -> None:
    problem = Quadratic({"a": (6, 8), "b": (4, 12)})
    masks = random_masks(problem.targets, 0.1) if pattern is None else None

    def path(ranking: Any) -> Any:
        pruner = CAP(block_size=8, damp=1e-6, ranking=ranking, pattern=pattern)
        return pruner.path(problem.targets, problem.rows, masks)

    auto = path("auto")
    marginal, cumulative = auto.candidates(0.6)
    assert same_result(marginal, auto.at(0.6))
    assert same_result(marginal, path("marginal").at(0.6))
    assert same_result(cumulative, path("cumulative").at(0.6))
    assert not same_result(marginal, cumulative)
    assert auto.curve([0.6]) == [marginal.saliency]
    assert len(auto.candidates(auto.sparsity)) == 1  # nothing to choose from
    assert len(path("marginal").candidates(0.6)) == 1
    one = CAP(block_size=8, ranking="auto", pattern=NofM(2, 4)).path(problem.targets, problem.rows)
    assert len(one.candidates(0.5)) == 1


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
        path = CAP(block_size=8, damp=1e-2, shrinkage=0.0).path(targets, [rows])
    result = path.at(0.5)
    assert 1 <= result.stats["blocks_damping_increased"] <= 4
    assert result.stats["blocks_float64"] >= result.stats["blocks_damping_increased"]
    assert result.stats["blocks"] == 5
    assert all(w.isfinite().all() for w in result.weights.values())


def test_a_damp_below_the_rounding_of_few_gradients_is_raised() -> None:
    """Sums of fewer rows than weights are singular, and rounding makes them cost less than nothing in some directions."""
    problem = Quadratic({"w": (1, 192)}, n=150)
    with pytest.warns(UserWarning, match=r"damp=1e-08: 1 of 1 Fisher blocks .* above the rounding"):
        path = CAP(block_size=192, damp=1e-8).path(problem.targets, problem.rows)
    assert path.stats["blocks_damping_increased"] == 1
    assert 1e-7 < path.stats["largest_damp"] < 1e-4
    x, w = problem.x["w"].double().numpy(), problem.w0["w"].numpy().ravel()
    exact = obs_block(x.T @ x / 150, w, np.ones(192, dtype=bool), 1e-8).losses
    for sparsity in (0.5, 0.75):
        assert problem.increase(path.at(sparsity), 192, 1e-8) < 1.3 * sum(exact[: int(192 * sparsity)])


def test_a_relative_damp_follows_the_scale_of_the_gradients() -> None:
    problem = Quadratic(SHAPES)
    results = {}
    for scale in (1e-3, 1.0, 1e3):
        rows = [{name: scale * g for name, g in chunk.items()} for chunk in problem.rows]
        results[scale] = CAP(block_size=24, damp=RelativeDamp(0.1)).path(problem.targets, rows).at(0.5)
    for result in results.values():
        assert all(torch.equal(result.masks[n], results[1.0].masks[n]) for n in SHAPES)
        assert all(torch.allclose(result.weights[n], results[1.0].weights[n], rtol=1e-3, atol=1e-5) for n in SHAPES)


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


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("damp", [1e-2, 1e-8])
def test_n_of_m(n: int, m: int, masked: bool, damp: float) -> None:
    targets = random_targets()
    rows, masks = gradient_rows(targets, 40), random_masks(targets, 0.3) if masked else None
    pruner = CAP(block_size=16, num_gradients=40, damp=damp, pattern=NofM(n, m))
    path = pruner.path(targets, rows, masks)
    result = path.at(1 - n / m)
    for name, weight in targets.items():
        w = result.weights[name]
        rows_out, inputs = w.shape[:2]
        alive = (masks or {}).get(name, torch.ones_like(w, dtype=torch.bool))
        for o in range(rows_out):
            for place in [()] if w.ndim == 2 else [(y, x) for y in range(2) for x in range(3)]:
                for i in range(0, inputs, m):
                    group = (o, slice(i, i + m), *place)
                    assert int(w[group].count_nonzero()) == min(n, int(alive[group].sum()))
        assert torch.equal(w != 0, result.masks[name])
        assert not (result.masks[name] & ~alive).any()
        assert weight.requires_grad
    assert same_result(path.at(1 - n / m), result)
    assert path.curve([1 - n / m]) == [result.predicted_loss]
    if masks is None:
        assert result.sparsity == pytest.approx(1 - n / m)
    for wrong in (0.0, 0.9, 1 - n / m - 0.01):
        for ask in (path.at, pruner.check_sparsity):
            with pytest.raises(PatternError, match=r"alone\. Ask for sparsity="):
                ask(wrong)


def test_n_of_m_refuses_targets_by_name_before_anything_runs() -> None:
    targets = random_targets()
    with pytest.raises(ConfigError, match="'odd'"):
        CAP(block_size=16, pattern=NofM(4, 8)).check(Targets({"odd": targets["odd"]}))

    def unread() -> Any:
        raise AssertionError("gradients were read")
        yield

    with pytest.raises(ConfigError, match="'linear' of shape"):
        CAP(block_size=15, pattern=NofM(1, 5)).path(targets, unread())
