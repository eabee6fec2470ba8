from __future__ import annotations

import torch
from torch import nn

from lightning_cap.healing.base import biases_of
from lightning_cap.sparsity.targets import Targets


def test_biases_of_targets_have_their_own_names() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 2))
    targets = Targets.from_model(model, include=["0.weight", "1.weight"])
    assert biases_of(model, targets) == {"0.bias": model[0].bias}
    assert biases_of(model[0], Targets({"weight": model[0].weight})) == {"bias": model[0].bias}


def test_biases_of_compiled_models_have_plain_names() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(4, 3)), nn.Linear(3, 2))
    targets = Targets.from_model(model, include=["0.weight"])
    assert list(biases_of(model, targets)) == ["0.bias"]
