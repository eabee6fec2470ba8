"""Methods of one saliency per weight, against sums over the gradient rows: equation 9, Taylor, OBD."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_cap.errors import ConfigError, GradientError
from lightning_cap.pruners import CAP, DiagonalFisher, GradientTimesWeight, Magnitude, Pruner, Taylor
from lightning_cap.sparsity.patterns import BlockOf, NofM, OutputRows
from lightning_cap.sparsity.targets import Targets
from tests.references.dense import least_mask, matrix_of
from tests.support.problems import Rows, gradient_rows, random_targets

SHAPES = {"a": (6, 8), "conv": (4, 4, 2, 3)}
METHODS: dict[str, tuple[Callable[..., Pruner], Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "GrW": (GradientTimesWeight, lambda w, g: np.mean([np.abs(w * row) for row in g], axis=0)),
    "Taylor": (Taylor, lambda w, g: -w * g.mean(0)),
    "OBD": (lambda **more: DiagonalFisher(damp=1e-3, **more), lambda w, g: w**2 * (1e-3 + (g**2).mean(0)) / 2),
    "GM": (lambda **more: Magnitude(**more), lambda w, g: np.abs(w)),
}


@pytest.fixture
def targets() -> Targets:
    return random_targets(SHAPES, seed=6)


@pytest.fixture
def rows(targets: Targets) -> Rows:
    return gradient_rows(targets, 30)


def _scores(method: str, targets: Targets, rows: Rows) -> dict[str, np.ndarray]:
    rule = METHODS[method][1]
    return {n: rule(w.double().numpy().ravel(), matrix_of(rows, n)) for n, w in targets.weights().items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_least_saliencies_go(method: str, targets: Targets, rows: Rows, masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    masks = {n: torch.rand(s, generator=generator) >= (0.2 if masked else 0.0) for n, s in SHAPES.items()}
    path = METHODS[method][0]().path(targets, rows, masks)
    alive = np.concatenate([m.numpy().ravel() for m in masks.values()])
    flat = np.where(alive, np.concatenate(list(_scores(method, targets, rows).values())), np.inf)
    for sparsity in (0.25, 0.5, 0.9):
        result = path.at(sparsity)
        gone = least_mask(flat, math.floor(sparsity * targets.numel + 0.5) - int((~alive).sum()))
        kept = np.concatenate([m.numpy().ravel() for m in result.masks.values()])
        np.testing.assert_array_equal(kept, alive & ~gone)
        losses = np.concatenate([w.double().numpy().ravel() ** 2 / 2 for w in targets.weights().values()])
        expected = (losses if method == "GM" else flat)[gone].sum()
        assert result.saliency == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert all(torch.equal(w, targets[n] * result.masks[n]) for n, w in result.weights.items())


def test_taylor_takes_what_lowers_the_loss_first(targets: Targets, rows: Rows) -> None:
    path = Taylor().path(targets, rows)
    scores = np.concatenate(list(_scores("Taylor", targets, rows).values()))
    negative = int((scores < 0).sum())
    least = path.at((negative - 0.25) / targets.numel)
    assert least.saliency == pytest.approx(scores[scores < 0].sum(), rel=1e-4)
    assert all(least.saliency <= loss for loss in path.curve([0.1, 0.3, 0.8, 0.95]))


@pytest.mark.parametrize("method", METHODS)
def test_groups_go_by_their_sum(method: str, targets: Targets, rows: Rows) -> None:
    result = METHODS[method][0](pattern=BlockOf(4)).path(targets, rows).at(0.5)
    scores = _scores(method, targets, rows)
    order = np.arange(96).reshape(4, 4, 2, 3).transpose(0, 2, 3, 1).ravel()  # channels last
    sums = np.concatenate([scores["a"], scores["conv"][order]]).reshape(-1, 4).sum(-1)
    kept = np.concatenate([result.masks["a"].numpy().ravel(), result.masks["conv"].numpy().ravel()[order]])
    np.testing.assert_array_equal(kept.reshape(-1, 4).any(-1), ~least_mask(sums, 18))
    np.testing.assert_array_equal(kept.reshape(-1, 4).all(-1), kept.reshape(-1, 4).any(-1))


@pytest.mark.parametrize("method", METHODS)
def test_rows_go_by_their_mean(method: str, targets: Targets, rows: Rows) -> None:
    """Rows of 8 and of 24 weights: the prefix, by saliency a weight, that fits into the budget."""
    result = METHODS[method][0](pattern=OutputRows()).path(targets, rows).at(0.55)
    means = [row.mean() for n, s in _scores(method, targets, rows).items() for row in s.reshape(SHAPES[n][0], -1)]
    sizes = np.array([8] * 6 + [24] * 4)
    order = np.argsort(means)
    taken = order[np.cumsum(sizes[order]) <= round(0.55 * 144)]
    kept = [bool(row.any()) for n in SHAPES for row in result.masks[n].flatten(1)]
    np.testing.assert_array_equal(np.flatnonzero(~np.array(kept)), np.sort(taken))
    assert all(OutputRows().is_satisfied(mask) for mask in result.masks.values())


@pytest.mark.parametrize("method", METHODS)
def test_n_of_m_by_hand(method: str, targets: Targets, rows: Rows) -> None:
    result = METHODS[method][0](pattern=NofM(1, 4)).path(targets, rows).at(0.75)
    for name, scores in _scores(method, targets, rows).items():
        lined_up = scores.reshape(SHAPES[name]).swapaxes(1, -1).reshape(-1, 4)  # groups of four inputs
        kept = result.masks[name].numpy().swapaxes(1, -1).reshape(-1, 4)
        if name == "a":
            lined_up, kept = scores.reshape(-1, 4), result.masks[name].numpy().reshape(-1, 4)
        np.testing.assert_array_equal(kept.argmax(-1), lined_up.argmax(-1))
        assert (kept.sum(-1) == 1).all()


def test_obd_is_cap_with_blocks_of_one(targets: Targets, rows: Rows) -> None:
    one = DiagonalFisher(damp=1e-2).path(targets, rows)
    two = CAP(block_size=1, damp=1e-2).path(targets, rows)
    for sparsity in (0.3, 0.8):
        assert all(torch.equal(one.at(sparsity).masks[n], two.at(sparsity).masks[n]) for n in SHAPES)
    assert one.curve([0.3, 0.8]) == pytest.approx(two.curve([0.3, 0.8]), rel=1e-4)


def test_a_large_damp_is_magnitude(targets: Targets, rows: Rows) -> None:
    one, two = DiagonalFisher(damp=1e8).path(targets, rows).at(0.5), Magnitude().path(targets).at(0.5)
    assert all(torch.equal(one.masks[n], two.masks[n]) for n in SHAPES)


@pytest.mark.parametrize("method", ["GrW", "Taylor", "OBD"])
def test_broken_sources_are_refused(method: str, targets: Targets, rows: Rows) -> None:
    pruner: Any = METHODS[method][0]()
    with pytest.raises(GradientError, match="the source gave no gradient row"):
        pruner.path(targets, [])
    with pytest.raises(GradientError, match=r"rows of 'conv' have shape \(4, 4, 6\)"):
        pruner.path(targets, [{**rows[0], "conv": rows[0]["conv"].flatten(-2)}])
    rows[1]["a"][0, 0, 0] = torch.inf
    with pytest.raises(GradientError, match="a saliency is not finite"):
        pruner.path(targets, rows)


def test_settings_are_checked() -> None:
    for make in (GradientTimesWeight, Taylor, DiagonalFisher):
        with pytest.raises(ConfigError, match="num_gradients=0: give a whole number"):
            make(num_gradients=0)
        with pytest.raises(ConfigError, match=r"samples_per_gradient=1\.5: give a whole number"):
            make(samples_per_gradient=1.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"damp=-1: give a number of at least 0"):
        DiagonalFisher(damp=-1)
