from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference_obs import best_weights, obs_block
from torch import Tensor, nn

from lightning_cap.errors import ConfigError, GradientError, PatternError
from lightning_cap.patterns import NofM
from lightning_cap.pruners import CAP, Magnitude, PruneResult
from lightning_cap.targets import Targets


class Quadratic:
    """Independent least-squares problems at their minimum: ``1/2 mean_i (x_i · (w - w0))²``, so each gradient outer
    product of ``x_i`` is the Hessian's own."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], n: int = 200, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x: dict[str, Tensor] = {}
        self.w0: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            d = torch.Size(shape).numel()
            mix = torch.eye(d) + 2.0 * torch.randn(d, d, generator=generator) / d**0.5
            self.x[name] = torch.randn(n, d, generator=generator) @ mix
            self.w0[name] = torch.randn(shape, generator=generator)

    @property
    def targets(self) -> Targets:
        return Targets({name: nn.Parameter(w.clone()) for name, w in self.w0.items()})

    @property
    def rows(self) -> list[dict[str, Tensor]]:
        rows = {name: x.view(-1, *self.w0[name].shape) for name, x in self.x.items()}
        return [{name: r[i : i + 64] for name, r in rows.items()} for i in range(0, 200, 64)]

    def increase(self, result: PruneResult, block_size: int, damp: float = 0.0) -> float:
        """``1/2 Δᵀ (F + damp) Δ`` summed over blocks, in float64 from the samples."""
        total = 0.0
        for name, w0 in self.w0.items():
            delta = (result.weights[name].double() - w0.double()).flatten()
            for d, x in zip(delta.split(block_size), self.x[name].double().split(block_size, 1), strict=True):
                total += 0.5 * float((x @ d).square().mean() + damp * d.square().sum())
        return total


SHAPES = {"a": (6, 8), "conv": (4, 3, 3, 3), "b": (1, 5)}


@pytest.mark.parametrize("ranking", ["marginal", "cumulative"])
@pytest.mark.parametrize("block_size", [1, 7, 24, 200])
@pytest.mark.parametrize("damp", [1e-8, 1e-1])
def test_predicted_loss_is_the_true_one(ranking: Any, block_size: int, damp: float) -> None:
    problem = Quadratic(SHAPES)
    path = CAP(block_size, damp=damp, ranking=ranking).path(problem.targets, problem.rows)
    for sparsity in (0.2, 0.5, 0.75, 0.95):
        result = path.at(sparsity)
        assert result.predicted_loss == pytest.approx(problem.increase(result, block_size, damp), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_beats_magnitude_where_weights_are_correlated(seed: int) -> None:
    problem = Quadratic(SHAPES, seed=seed)
    cap = CAP(200, damp=1e-6).path(problem.targets, problem.rows)
    magnitude = Magnitude().path(problem.targets)
    for sparsity in (0.3, 0.5, 0.7, 0.9):
        ours, theirs = (problem.increase(path.at(sparsity), 200) for path in (cap, magnitude))
        assert ours < 0.75 * theirs


@pytest.mark.parametrize("sparsity", [0.3, 0.6, 0.9])
def test_marginal_ranking_predicts_no_more_than_cumulative(sparsity: float) -> None:
    problem = Quadratic(SHAPES)
    losses = {
        ranking: CAP(8, damp=1e-6, ranking=ranking).path(problem.targets, problem.rows).at(sparsity).predicted_loss
        for ranking in ("marginal", "cumulative")
    }
    assert losses["marginal"] < losses["cumulative"]


@pytest.mark.parametrize("pattern", [None, NofM(2, 4)])
def test_agrees_with_the_textbook_from_gradients_to_weights(pattern: NofM | None) -> None:
    """The whole way: gradients, Fisher, layout, elimination and reconstruction of a linear and a convolution weight."""
    problem = Quadratic({"linear": (3, 8), "conv": (2, 4, 1, 3)})
    result = CAP(24, damp=1e-3, pattern=pattern).path(problem.targets, problem.rows).at(0.5)
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
        result = CAP(16, damp=1e-4).path(targets, problem.rows, masks).at(sparsity)
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
        path = CAP(8, damp=1e-2).path(targets, [rows])
    result = path.at(0.5)
    assert 1 <= result.stats["blocks_redamped"] <= 4
    assert result.stats["blocks_float64"] >= result.stats["blocks_redamped"]
    assert result.stats["blocks"] == 5
    assert all(w.isfinite().all() for w in result.weights.values())


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
        CAP(8).path(problem.targets, [])
    broken = problem.rows
    broken[1]["a"][3, 2, 2] = float("nan")
    with pytest.raises(GradientError, match="first 'a', are not finite"):
        CAP(8).path(problem.targets, broken)
    with pytest.raises(PatternError):
        CAP(pattern=124)
