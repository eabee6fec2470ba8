from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_cap.pruners import Random
from lightning_cap.sparsity.targets import Targets
from tests.support.problems import random_targets

SHAPES = {"a": (6, 8), "conv": (4, 4, 2, 3)}


@pytest.fixture
def targets() -> Targets:
    return random_targets(SHAPES, seed=6)


def test_random_lots_follow_the_seed_and_the_name(targets: Targets) -> None:
    def masks(seed: int, given: Targets = targets) -> dict[str, Tensor]:
        return dict(Random(seed=seed).path(given).at(0.5).masks)

    assert all(torch.equal(masks(0)[n], masks(0)[n]) for n in SHAPES)
    assert any(not torch.equal(masks(0)[n], masks(1)[n]) for n in SHAPES)
    alone = Targets({"conv": targets["conv"]})
    lots = Random(seed=0).path(alone).at(0.5).masks["conv"]
    again = Random(seed=0).path(Targets({"conv": nn.Parameter(torch.randn(SHAPES["conv"]))})).at(0.5).masks["conv"]
    assert torch.equal(lots, again), "the weights do not matter"
    other = Random(seed=0).path(Targets({"other": targets["conv"]})).at(0.5).masks["other"]
    assert not torch.equal(lots, other)


def test_random_events_of_one_run_are_nested(targets: Targets) -> None:
    first = Random(seed=2).path(targets).at(0.4)
    first.apply(targets)
    second = Random(seed=2).path(targets, masks=first.masks).at(0.7)
    direct = Random(seed=2).path(targets).at(0.7)
    assert all(torch.equal(second.masks[n], direct.masks[n]) for n in SHAPES)


def test_random_is_fair(targets: Targets) -> None:
    large = Targets({"w": nn.Parameter(torch.randn(100, 200))})
    share = Random(seed=0).path(large).at(0.3).masks["w"].float()
    assert share.mean(0).std() < 0.06  # of 100 rows: about sqrt(0.21 / 100) = 0.046
    assert share.mean(1).std() < 0.05
