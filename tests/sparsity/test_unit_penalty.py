"""The penalty on units that are to be pruned, against plain loops and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_cap.sparsity import Units, unit_penalty
from tests.support.units import SmallNet, small_units


def small(seed: int = 0) -> tuple[dict[str, Tensor], Units, dict[str, Tensor]]:
    """Weights of the small network in float64, its units, and half of each group to be pruned."""
    torch.manual_seed(seed)
    model, units = SmallNet().double(), small_units()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    kept = {name: torch.arange(size) % 2 == 0 for name, size in units.sizes.items()}
    return dict(model.named_parameters()), units, kept


def by_loops(weights: dict[str, Tensor], units: Units, kept: dict[str, Tensor], shifts: bool) -> float:
    total = 0.0
    for name, group in units.items():
        norms = [part for part in group.norms if shifts or part.name != "bn.bias"]
        for unit in range(group.size):
            if kept[name][unit]:
                continue
            values: list[float] = []
            for part in norms or group.producers:
                for entry in part.index[unit].tolist():
                    values += weights[part.name].select(part.dim, entry).flatten().tolist()
            total += sum(abs(v) for v in values) if norms else math.sqrt(sum(v * v for v in values))
    return total


@pytest.mark.parametrize("shifts", [True, False])
def test_value_and_gradient_are_those_of_plain_loops(shifts: bool) -> None:
    weights, units, kept = small()
    value = unit_penalty(weights, units, kept, shifts)
    assert value.item() == pytest.approx(by_loops(weights, units, kept, shifts), rel=1e-6)  # summed in float32
    value.backward()
    step = 1e-6
    for name, weight in weights.items():
        found = torch.zeros_like(weight) if weight.grad is None else weight.grad
        flat = weight.detach().view(-1)
        for place in range(0, flat.numel(), max(1, flat.numel() // 7)):
            before = float(flat[place])
            ends = []
            for sign in (1, -1):
                flat[place] = before + sign * step
                ends.append(by_loops(weights, units, kept, shifts))
            flat[place] = before
            assert float(found.view(-1)[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-5), name


def test_kept_units_have_no_gradient_at_all() -> None:
    weights, units, kept = small()
    unit_penalty(weights, units, kept).backward()
    masks = units.masks({name: tuple(w.shape) for name, w in weights.items()}, kept)
    for name, weight in weights.items():
        assert weight.grad is None or not weight.grad[masks[name]].any(), name
    for name in ("bn.weight", "bn.bias", "fc1.weight", "qkv.weight"):
        assert weights[name].grad is not None, name
    assert weights["conv1.weight"].grad is None, "the norm behind it is drawn"
    assert weights["fc2.weight"].grad is None, "what reads a unit is left alone"
    assert weights["bn.weight"].grad is not None
    assert torch.equal(weights["bn.weight"].grad[1::2], weights["bn.weight"].detach().sign()[1::2])


def test_units_at_zero_have_a_gradient_of_zero() -> None:
    weights, units, kept = small()
    with torch.no_grad():
        for weight in weights.values():
            weight.zero_()
    value = unit_penalty(weights, units, kept)
    value.backward()
    assert value.item() == 0
    assert all(weight.grad is None or not weight.grad.any() for weight in weights.values())


def test_nothing_to_prune_costs_nothing() -> None:
    weights, units, kept = small()
    assert float(unit_penalty(weights, units, {})) == 0
    assert float(unit_penalty(weights, units, {name: torch.ones_like(left) for name, left in kept.items()})) == 0
