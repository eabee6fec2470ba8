"""`prune` with pruners of units: the model's own inputs, goals of their cost, and a smaller model in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_cap import prune
from lightning_cap.errors import ConfigError, UnsupportedError
from lightning_cap.export import shrink
from lightning_cap.pruners import CAPUnits, MagnitudeUnits
from lightning_cap.sparsity import Flops

pytest.importorskip("torch_pruning")

Batch = tuple[Tensor, Tensor]


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))


def _batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(4)]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def _flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 6))
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    "make",
    [lambda: MagnitudeUnits(cost=Flops()), lambda: CAPUnits(cost=Flops(), num_gradients=16, num_inputs=16)],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_half_of_the_flops_in_one_step_and_in_several(make: Callable[[], Any], steps: int) -> None:
    model, dense = _model(), _model()
    result = prune(model, _batches(), _loss, 0.5, make(), num_recomputations=steps, progress=False)
    small = shrink(model, result.masks, example_input=torch.zeros(1, 6))
    assert 0 <= 0.5 * _flops(dense) - _flops(small) <= 2 * (6 + 24 + 16 + 3)  # to one unit
    images = _batches()[0][0]
    assert torch.allclose(small(images), model(images), atol=1e-6)
    assert not torch.equal(model(images), dense(images))


def test_pruning_goes_on_from_units_that_are_pruned() -> None:
    model = _model()
    first = prune(model, _batches(), _loss, 0.25, MagnitudeUnits(cost=Flops()), progress=False)
    second = prune(model, _batches(), _loss, 0.5, MagnitudeUnits(cost=Flops()), progress=False)
    assert all(bool((first.masks[name] | ~second.masks[name]).all()) for name in first.masks)
    assert sum(int(mask.sum()) for mask in second.masks.values()) < sum(int(m.sum()) for m in first.masks.values())


def test_groups_are_left_out_by_name() -> None:
    model = _model()
    prune(model, _batches(), _loss, 0.2, MagnitudeUnits(cost=Flops()), exclude=["0"], progress=False)
    assert bool((model[0].weight != 0).any(1).all())
    assert not bool((model[2].weight != 0).any(1).all())


def test_what_cannot_be_found_is_said() -> None:
    with pytest.raises(ConfigError, match="batches: there is none to find the units with"):
        prune(_model(), [], _loss, 0.5, MagnitudeUnits(), progress=False)
    other = _model()
    with pytest.raises(UnsupportedError, match="does not call the model that it is given"):
        prune(_model(), _batches(), lambda m, batch: _loss(other, batch), 0.5, MagnitudeUnits(), progress=False)
