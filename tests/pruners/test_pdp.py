"""The soft masks of PDP by plain loops, and its hard ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_cap.errors import CAPError, ConfigError
from lightning_cap.pruners import PDP, Magnitude
from lightning_cap.pruners.pdp import soft_mask, soft_threshold, softened_zeros
from lightning_cap.sparsity import ERK, NofM, Targets


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("zeros", [1, 7, 11, 12])
@pytest.mark.parametrize("tau", [1e-4, 0.1, 3.0])
def test_soft_mask_is_that_of_the_paper(zeros: int, tau: float) -> None:
    weight = drawn(3, 4)
    flat = sorted(abs(float(w)) for w in weight.flatten())
    wanted = (flat[zeros - 1] + flat[min(zeros, 11)]) / 2
    threshold = soft_threshold(weight, zeros)
    assert float(threshold) == pytest.approx(wanted, rel=1e-14)
    mask = soft_mask(weight, threshold, tau)
    for w, m in zip(weight.flatten().tolist(), mask.flatten().tolist(), strict=True):
        a, b = w * w / tau, wanted**2 / tau  # softmax of (a, b), from which the larger is taken off
        assert m == pytest.approx(
            math.exp(a - max(a, b)) / (math.exp(a - max(a, b)) + math.exp(b - max(a, b))), rel=1e-9, abs=1e-300
        )
    assert int((mask < 0.5).sum()) == (zeros if zeros < 12 else 11)  # of all, the largest is at its own threshold


def test_gradients_flow_through_the_mask_but_not_through_the_threshold() -> None:
    weight, tau = drawn(3, 4).requires_grad_(), 0.3
    threshold = soft_threshold(weight, 7)
    assert not threshold.requires_grad
    assert torch.autograd.gradcheck(lambda w: w * soft_mask(w, threshold, tau), (weight,))
    (given,) = torch.autograd.grad((weight * soft_mask(weight, threshold, tau)).sum(), weight)
    m = soft_mask(weight, threshold, tau).detach()
    assert torch.allclose(given, m + 2 * weight.detach() ** 2 / tau * m * (1 - m), rtol=1e-10)


def test_a_half_precision_weight_has_a_mask_of_its_own_type() -> None:
    weight = drawn(3, 4).bfloat16()
    mask = soft_mask(weight, soft_threshold(weight, 5), 1e-4)
    assert mask.dtype == torch.bfloat16
    assert int((mask < 0.5).sum()) == 5


def test_zeros_of_a_target_rise_with_the_share_from_those_there_are() -> None:
    assert [softened_zeros(100, 0, share) for share in (0.0, 0.015, 0.7, 1.0)] == [0, 1, 70, 100]
    assert [softened_zeros(100, 40, share) for share in (0.1, 0.4, 0.5)] == [40, 40, 50]


def targets() -> Targets:
    return Targets({"a.weight": drawn(6, 8).float(), "b.weight": 3 * drawn(5, 8, seed=1).float()})


def test_fixed_zeros_of_each_target_are_pruned_by_magnitude_whatever_has_become_of_the_weights() -> None:
    pruner, weights = PDP(), targets()
    pruner.fix_zeros(weights, None, 0.5)
    fixed = dict(pruner.zeros)
    both = torch.cat([weight.flatten() for weight in weights.values()]).abs().sort().values
    assert fixed == {name: int((weight.abs() <= both[43]).sum()) for name, weight in weights.items()}
    assert fixed["a.weight"] > fixed["b.weight"]

    now = Targets({name: weight * (0.1 if name[0] == "b" else 1) for name, weight in targets().items()})
    result = pruner.path(now).at(0.5)
    for name, weight in now.items():
        threshold = soft_threshold(weight, fixed[name])
        assert torch.equal(result.masks[name], soft_mask(weight, threshold, 1e-4) > 0.5)
        assert torch.equal(result.weights[name], torch.where(weight.abs() > threshold, weight, 0.0))
    other = PDP()
    other.load_state_dict(pruner.state_dict())
    assert other.zeros == fixed
    assert all(torch.equal(mask, result.masks[name]) for name, mask in other.path(now).at(0.5).masks.items())


@pytest.mark.parametrize("allocation", [None, ERK()])
def test_alone_it_is_magnitude(allocation: ERK | None) -> None:
    own = {} if allocation is None else {"allocation": allocation}
    wanted = Magnitude(**own).path(targets()).at(0.6)
    found = PDP(**own).path(targets()).at(0.6)
    assert all(torch.equal(found.masks[name], mask) for name, mask in wanted.masks.items())
    fixed = PDP(**own)
    fixed.fix_zeros(targets(), None, 0.6)
    less = Magnitude(**own).path(targets()).at(0.3)
    assert all(torch.equal(fixed.path(targets()).at(0.3).masks[name], mask) for name, mask in less.masks.items())


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(CAPError, match=r"PDP makes masks of single weights"):
        PDP(pattern=NofM(2, 4))
    for state in ({"zeros": [1]}, {"zeros": {"a": 0.5}}, {"zeros": {"a": -1}}, {"zeros": {"a": True}}, []):
        with pytest.raises(ConfigError):
            PDP().load_state_dict(state)  # type: ignore[arg-type]
    pruner = PDP()
    pruner.load_state_dict({"zeros": {"c.weight": 3}})
    with pytest.raises(ConfigError, match="Give the targets"):
        pruner.path(targets()).at(0.5)
    with pytest.warns(UserWarning, match="PDPCallback"):
        PDP().begin_event(0.0)
