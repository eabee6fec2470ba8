from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_cap.pruners import Magnitude
from lightning_cap.sparsity.allocation import Uniform
from lightning_cap.sparsity.targets import Targets

A = torch.tensor([[0.1, -3.0, 0.5, -0.2]])
B = torch.tensor([[5.0, -6.0, 0.3, 7.0]])


def _targets() -> Targets:
    return Targets({"a": nn.Parameter(A.clone()), "b": nn.Parameter(B.clone())})


def test_the_smallest_go_over_all_targets() -> None:
    path = Magnitude().path(_targets())  # needs no gradients
    result = path.at(0.5)
    assert result.weights["a"].tolist() == [[0.0, -3.0, 0.0, 0.0]]
    assert torch.equal(result.weights["b"], torch.tensor([[5.0, -6.0, 0.0, 7.0]]))
    assert result.saliency == pytest.approx((0.1**2 + 0.5**2 + 0.2**2 + 0.3**2) / 2)
    assert Magnitude().statistic is None


def test_uniform_prunes_each_target_alike() -> None:
    result = Magnitude(allocation=Uniform()).path(_targets()).at(0.5)
    assert torch.equal(result.weights["a"], torch.tensor([[0.0, -3.0, 0.5, 0.0]]))
    assert torch.equal(result.weights["b"], torch.tensor([[0.0, -6.0, 0.0, 7.0]]))


def test_ties_go_to_the_earlier_weight() -> None:
    targets = Targets({"a": nn.Parameter(torch.ones(1, 4)), "b": nn.Parameter(-torch.ones(1, 4))})
    result = Magnitude().path(targets).at(0.75)
    assert result.masks["a"].tolist() == [[False] * 4]
    assert result.masks["b"].tolist() == [[False, False, True, True]]


def test_masked_weights_neither_count_nor_return() -> None:
    masks = {"a": torch.tensor([[True, False, True, True]])}  # the largest of its target
    path = Magnitude().path(_targets(), masks=masks)
    assert torch.equal(path.at(0.125).weights["a"], torch.tensor([[0.1, 0.0, 0.5, -0.2]]))
    assert torch.equal(path.at(0.25).weights["a"], torch.tensor([[0.0, 0.0, 0.5, -0.2]]))
    assert path.at(0.25).saliency == pytest.approx(0.1**2 / 2)


def test_a_convolution_is_flattened_as_stored() -> None:
    weight = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    result = Magnitude().path(Targets({"w": nn.Parameter(weight)})).at(0.5)
    assert torch.equal(result.masks["w"], weight.abs() > weight.abs().flatten().sort().values[23])
