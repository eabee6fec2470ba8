"""WoodFisher against dense float64 inverses: saliencies (equation 2), groups and updates (equation 5)."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_cap.errors import ConfigError, PatternError
from lightning_cap.pruners import CAP, PruneResult, WoodFisher
from lightning_cap.sparsity.patterns import BlockOf, NofM, OutputRows
from lightning_cap.sparsity.targets import Targets
from tests.references.dense import (
    alive_inverse,
    cuts,
    damped_fisher,
    joint_update,
    least_in_groups,
    least_mask,
    matrix_of,
    saliencies,
    simple_update,
)
from tests.references.obs import best_weights
from tests.support.problems import gradient_rows

SHAPES = {"a": (6, 16), "b": (4, 8)}
Rows = list[dict[str, Tensor]]


class Problem:
    """Weights, masks and gradient rows, and the inverse of every block."""

    def __init__(self, block_size: int, damp: float, masked: bool) -> None:
        generator = torch.Generator().manual_seed(5)
        self.targets = Targets({n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()})
        self.rows = gradient_rows(self.targets, 150)
        share = 0.25 if masked else 0.0
        self.masks = {n: torch.rand(s, generator=generator) >= share for n, s in SHAPES.items()}
        self.numel = self.targets.numel
        self.blocks: list[tuple[str, slice, np.ndarray, np.ndarray, np.ndarray]] = []
        for name, weight in self.targets.weights().items():
            G, w, alive = matrix_of(self.rows, name), weight.double().numpy().ravel(), self.masks[name].numpy().ravel()
            for part in cuts(w.size, block_size):
                inverse = alive_inverse(damped_fisher(G[:, part], damp), alive[part])
                self.blocks.append((name, part, inverse, np.where(alive[part], w[part], 0.0), alive[part]))

    @property
    def existing(self) -> int:
        return sum(int((~m).sum()) for m in self.masks.values())

    def path(self, pruner: Any) -> Any:
        return pruner.path(self.targets, self.rows, self.masks)

    def gone(self, result: PruneResult) -> list[np.ndarray]:
        """What went, block by block."""
        kept = {name: mask.numpy().ravel() for name, mask in result.masks.items()}
        return [alive & ~kept[name][part] for name, part, _, _, alive in self.blocks]

    def check_weights(self, result: PruneResult, update: Any) -> None:
        for (name, part, inverse, w, alive), gone in zip(self.blocks, self.gone(result), strict=True):
            expected = update(inverse, w, alive, gone) if gone.any() else w
            got = result.weights[name].numpy().ravel()[part]
            np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4)


UPDATES: dict[str, Any] = {
    "joint": joint_update,
    "simple": simple_update,
    "none": lambda inverse, w, alive, gone: np.where(gone, 0.0, w),
}


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("block_size", "damp"), [(7, 1e-2), (16, 1e-6), (100, 1e-3)])
def test_saliencies_and_updates(
    update: Literal["joint", "simple", "none"],
    masked: bool,
    block_size: int,
    damp: float,
) -> None:
    problem = Problem(block_size, damp, masked)
    path = problem.path(WoodFisher(block_size=block_size, damp=damp, update=update))
    scores = [np.where(alive, saliencies(H, w, alive), np.inf) for _, _, H, w, alive in problem.blocks]
    flat = np.concatenate(scores)
    for sparsity in (0.3, 0.5, 0.8, 0.97):
        result = path.at(sparsity)
        chosen = least_mask(flat, math.floor(sparsity * problem.numel + 0.5) - problem.existing)
        np.testing.assert_array_equal(np.concatenate(problem.gone(result)), chosen)
        assert result.predicted_loss == pytest.approx(flat[chosen].sum(), rel=1e-4)
        problem.check_weights(result, UPDATES[update])


def test_the_joint_update_is_the_best_there_is() -> None:
    problem = Problem(16, 1e-3, masked=False)
    result = problem.path(WoodFisher(block_size=16, damp=1e-3)).at(0.6)
    for (name, part, H, w, _), gone in zip(problem.blocks, problem.gone(result), strict=True):
        expected = best_weights(np.linalg.inv(H), w, ~gone, 0.0)
        np.testing.assert_allclose(result.weights[name].numpy().ravel()[part], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("update", ["joint", "simple"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_groups(update: Literal["joint", "simple"], masked: bool, size: int) -> None:
    problem = Problem(16, 1e-3, masked)
    path = problem.path(WoodFisher(block_size=16, damp=1e-3, update=update, pattern=BlockOf(size)))
    costs = np.concatenate([saliencies(H, w, alive, size) for _, _, H, w, alive in problem.blocks])
    members = np.concatenate([alive.reshape(-1, size).sum(-1) for *_, alive in problem.blocks])
    order = np.argsort(costs / np.maximum(members, 1), kind="stable")
    for sparsity in (0.4, 0.75, 0.9):
        result = path.at(sparsity)
        room = math.floor(sparsity * problem.numel + 0.5) - problem.existing
        taken = order[: int((np.cumsum(members[order]) <= room).sum())]
        taken = taken[members[taken] > 0]
        gone = np.concatenate(problem.gone(result)).reshape(-1, size).any(-1)
        assert set(np.flatnonzero(gone)) == set(taken)
        assert sum(part.sum() for part in problem.gone(result)) == members[taken].sum()
        assert result.predicted_loss == pytest.approx(costs[taken].sum(), rel=1e-3)
        rule = joint_update if update == "joint" else lambda *given: simple_update(*given, group=size)
        problem.check_weights(result, rule)


@pytest.mark.parametrize("masked", [False, True])
def test_n_of_m_takes_the_least_of_every_group(masked: bool) -> None:
    problem = Problem(16, 1e-3, masked)
    result = problem.path(WoodFisher(block_size=16, damp=1e-3, pattern=NofM(2, 4))).at(0.5)
    for (_, _, H, w, alive), gone in zip(problem.blocks, problem.gone(result), strict=True):
        np.testing.assert_array_equal(gone, least_in_groups(saliencies(H, w, alive), alive, 2, 4))
    problem.check_weights(result, joint_update)


def test_one_weight_a_block_loses_as_cap_does() -> None:
    problem = Problem(1, 1e-2, masked=False)
    ours, caps = (problem.path(pruner(block_size=1, damp=1e-2)).at(0.7) for pruner in (WoodFisher, CAP))
    assert all(torch.equal(ours.weights[n], caps.weights[n]) for n in SHAPES)
    assert ours.predicted_loss == pytest.approx(caps.predicted_loss, rel=1e-5)


def test_what_does_not_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="update='both': choose 'joint', 'simple' or 'none'"):
        WoodFisher(update="both")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"damp=0: give a number above 0"):
        WoodFisher(damp=0)
    with pytest.raises(
        PatternError, match=r"pattern=OutputRows\(\): WoodFisher works inside blocks.*Use DiagonalFisher"
    ):
        WoodFisher(pattern=OutputRows())
