from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_cap.errors import UnsupportedError
from lightning_cap.sparsity.latency_parts import Part, find_parts, shrunk
from lightning_cap.sparsity.units import Slice, UnitGroup, Units
from tests.support.clocks import SlowNet, slow_units


def parts_of(model: nn.Module, units: Units) -> dict[str, Part]:
    found = find_parts(model.eval(), units, lambda m: m(torch.ones(1, 3)))
    assert len({part.module for part in found}) == len(found)
    return {part.module: part for part in found}


def test_parts_are_the_largest_modules_of_two_groups():
    parts = parts_of(model := SlowNet(blocks=4), slow_units(model))
    assert list(parts) == ["", "first", "blocks", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "last"]
    stream = 0
    assert {name: set(part.groups) for name, part in parts.items()} == {
        "": set(),  # its inputs and outputs do not change, and many groups are in it
        "first": {stream},
        "blocks": {stream},
        "blocks.0": {stream, 1},
        "blocks.1": {stream, 2},
        "blocks.2": {stream, 3},
        "blocks.3": {stream, 4},
        "last": {stream},
    }
    assert [name for name, part in parts.items() if not part.on_grid] == ["", "blocks"]


def test_a_module_of_groups_apart_is_divided():
    """As a block of a transformer whose stream stays."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = SlowNet(blocks=1), SlowNet(blocks=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.two(x)

    model = Two()
    units = Units(
        [*slow_units(model.one, "one.", stream=False).values(), *slow_units(model.two, "two.", stream=False).values()]
    )
    parts = parts_of(model, units)
    assert list(parts) == ["", "one", "two"]
    assert parts["one"].on_grid
    assert parts["one"].groups == (0,)
    assert parts["one"].like == parts["two"].like
    assert parts[""].groups == (0, 1)
    assert not parts[""].on_grid


def test_parts_alike_have_the_same_groups_in_the_same_roles():
    """Square layers into and out of a stream look the same; what is read in the one is made in the other."""
    model = SlowNet(stream=8, width=8, blocks=2)
    units = slow_units(model)
    parts = parts_of(model, units)
    assert parts["blocks.0"].like == parts["blocks.1"].like
    roles = [[group == 0 for group in parts[name].groups] for name in ("blocks.0", "blocks.1")]
    assert roles[0] == roles[1]
    assert parts["first"].like != parts["last"].like


def test_parts_of_other_shapes_are_not_alike():
    model = SlowNet(blocks=2)
    model.blocks[1].up, model.blocks[1].down = nn.Linear(6, 4), nn.Linear(4, 6)
    parts = parts_of(model, slow_units(model))
    assert parts["blocks.0"].like != parts["blocks.1"].like


def test_a_shrunk_copy_has_so_many_units():
    model = SlowNet()
    smaller = shrunk(model, slow_units(model), {0: 2, 2: 5})
    assert smaller.blocks[1].up.weight.shape == (5, 2)
    assert smaller.blocks[0].up.weight.shape == (8, 2)
    assert model.blocks[1].up.weight.shape == (8, 6)


def test_units_without_which_the_model_does_not_run_are_refused():
    model = SlowNet()
    index = torch.arange(6)[:, None]
    units = Units([UnitGroup("first", "neuron", 6, (Slice("first.weight", 0, index),), (), ())])
    with pytest.raises(UnsupportedError, match="with half the units of 'first' the model does not run"):
        parts_of(model, units)
