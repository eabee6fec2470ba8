from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_cap.pruners import Magnitude, PruneResult
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.mending import CHOICE_SAMPLES, Mender
from lightning_cap.utilities.rng import Domain


def candidates(targets: Targets) -> list[PruneResult]:
    """That scale the weights by 0.5, 1 and 0.25."""
    with Magnitude().path(targets) as path:
        result = path.at(0.0)
    return [replace(result, weights={"weight": by * targets["weight"].detach()}) for by in (0.5, 1.0, 0.25)]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({0.5: 2.0, 1.0: 1.0, 0.25: 3.0}, 1),
        ({0.5: 1.0, 1.0: 1.0, 0.25: 1.0}, 0),
        ({0.5: math.nan, 1.0: 2.0, 0.25: 1.0}, 2),
    ],
    ids=["least", "equal", "nan"],
)
def test_the_solution_of_least_measured_loss_is_chosen(losses: dict[float, float], best: int) -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    targets, read = Targets({"weight": model.weight}), []

    @contextlib.contextmanager
    def reader(samples: int, use: Domain, index: int) -> Iterator[Any]:
        read.append((samples, use, index))
        yield [torch.ones(CHOICE_SAMPLES, 1)] * 3

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return torch.tensor(losses[float(model.weight.detach())])

    several = candidates(targets)
    chosen = Mender(model, targets, None, reader, loss).choose(several, 7)
    assert chosen.weights is several[best].weights
    assert chosen.stats["candidate"] == best
    assert float(model.weight.detach()) == 1.0
    assert read == [(256, Domain.CHOICE, 7)] * 3
    assert Mender(model, targets, None, None, loss).choose(several, 0) is several[0]
    assert Mender(model, targets, None, reader, loss).choose(several[2:], 0) is several[2]
    assert len(read) == 3
