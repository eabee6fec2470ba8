"""Units of real models: what is found, and that they can go."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_cap.sparsity import Units
from lightning_cap.sparsity.unit_group import Slice
from tests.support.unit_families import FAMILIES, example, make


def _random_units(units: Units, seed: int = 0) -> dict[str, Tensor]:
    """``{group: bool (size)}`` with about half of the units kept, one at least."""
    rng = torch.Generator().manual_seed(seed)
    kept = {name: torch.rand(size, generator=rng) < 0.5 for name, size in units.sizes.items()}
    for name in kept:
        kept[name][0] = True
    return kept


@torch.no_grad()
def _without(model: nn.Module, units: Units, kept: dict[str, Tensor], roles: tuple[str, ...]) -> nn.Module:
    """A copy of the model in which pruned units have zeros in slices of those roles."""
    model = copy.deepcopy(model)
    for name, group in units.items():
        for part in (part for role in roles for part in getattr(group, role)):
            model.get_parameter(part.name).index_fill_(part.dim, part.entries(~kept[name]), 0.0)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def found(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Tensor, Units]:
    model, inputs = make(request.param), example(request.param)
    return request.param, model, inputs, Units.from_model(model, inputs)


_CONSTANT = ("mlp",)  # a sigmoid of zero is none
_NORMALIZED = ("convnext_v2",)  # a unit has a part in the mean that the others are divided by


def _check(found: tuple[str, nn.Module, Tensor, Units], roles: tuple[str, ...]) -> None:
    """Pruned units make no difference any more where the slices of those roles alone are zero."""
    _, model, inputs, units = found
    model, inputs = copy.deepcopy(model).double(), inputs.double()
    kept = _random_units(units)
    masked = _without(model, units, kept, ("producers", "norms", "consumers"))
    with torch.no_grad():
        assert not torch.allclose(model(inputs), masked(inputs))
        torch.testing.assert_close(_without(model, units, kept, roles)(inputs), masked(inputs), rtol=0, atol=1e-9)


def test_what_pruned_units_make_is_read_by_their_consumers_alone(found: tuple[str, nn.Module, Tensor, Units]) -> None:
    if found[0] not in _NORMALIZED:
        _check(found, ("consumers",))


def test_consumers_read_nothing_but_pruned_units(found: tuple[str, nn.Module, Tensor, Units]) -> None:
    if found[0] not in _CONSTANT:
        _check(found, ("producers", "norms"))


def test_an_entry_belongs_to_one_unit_at_most(found: tuple[str, nn.Module, Tensor, Units]) -> None:
    _, model, _, units = found
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    seen: dict[tuple[str, int], Tensor] = {}
    for group in units.values():
        for part in (*group.slices, *group.buffers):
            counts = seen.setdefault((part.name, part.dim), torch.zeros(tensors[part.name].shape[part.dim]))
            counts.index_add_(0, part.index.flatten(), torch.ones(part.index.numel()))
            assert part.index.shape[0] == group.size
    assert max(float(counts.max()) for counts in seen.values()) == 1


def test_masks_say_which_units_are_kept(found: tuple[str, nn.Module, Tensor, Units]) -> None:
    _, model, _, units = found
    kept = _random_units(units)
    masks = units.masks(units.targets(model).shapes, kept)
    again = units.kept(masks)
    assert all(torch.equal(again[name], kept[name]) for name in units)


def _names(parts: tuple[Slice, ...]) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {part.name: (part.dim, tuple(part.index.shape)) for part in parts}


def test_units_of_a_vit() -> None:
    units = Units.from_model(make("vit"), example("vit"))
    assert repr(units) == "Units(6 heads in 2 groups, 384 neurons in 2 groups)"
    heads, neurons = units["blocks.0.attn"], units["blocks.0.mlp"]
    assert _names(heads.producers) == {"blocks.0.attn.qkv.weight": (0, (3, 48)), "blocks.0.attn.qkv.bias": (0, (3, 48))}
    assert heads.producers[0].index[1].tolist() == [*range(16, 32), *range(64, 80), *range(112, 128)]
    assert _names(heads.consumers) == {"blocks.0.attn.proj.weight": (1, (3, 16))}
    assert _names(neurons.producers) == {
        "blocks.0.mlp.fc1.weight": (0, (192, 1)),
        "blocks.0.mlp.fc1.bias": (0, (192, 1)),
    }
    assert _names(neurons.consumers) == {"blocks.0.mlp.fc2.weight": (1, (192, 1))}
    assert units.skipped["head"] == "an output of the model"
    assert "include 'patch_embed.proj.stream'" in units.skipped["patch_embed.proj"]


def test_layers_of_a_vit_depend_on_their_units() -> None:
    units = Units.from_model(make("vit"), example("vit"))
    layers = {layer.name: layer for layer in units.layers}
    tokens, width = 5, 48
    assert layers["blocks.0.mlp.fc1"].flops == 2 * tokens * width * 4 * width
    assert layers["blocks.0.attn"].flops == 4 * tokens * tokens * width
    assert [(w.full, w.per_unit) for w in layers["blocks.0.attn"].widths] == [(3, {"blocks.0.attn": 1})]
    assert [(w.full, w.per_unit) for w in layers["blocks.0.attn.qkv"].widths] == [(144, {"blocks.0.attn": 48})]
    assert units.flops == sum(layer.flops for layer in units.layers) + 2 * (4 * width * 768 + 5 * width)


def test_residual_streams_go_together() -> None:
    units = Units.from_model(make("resnet20"), example("resnet20"))
    stream = units["conv1.stream"]
    assert stream.size == 16
    assert len(stream.producers) == 10  # the first convolution and the last of each block
    later = {part.name: part.index[0].item() for part in stream.producers}
    assert later["layer1.0.conv2.weight"] == 0
    assert later["layer2.0.conv2.weight"] == 8
    assert later["layer3.0.conv2.weight"] == 24
    assert {part.name for part in stream.buffers} >= {"bn1.running_mean", "bn1.running_var"}
    assert sum(group.size for group in units.values()) == 16 + 3 * 16 + 3 * 32 + 3 * 64


def test_columns_behind_a_flattening_go_with_their_channel() -> None:
    units = Units.from_model(make("convolutions"), example("convolutions"))
    last = units["3"].consumers[0]
    assert (last.name, tuple(last.index.shape), last.index[1].tolist()) == ("6.weight", (4, 9), list(range(9, 18)))


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = make("resnet"), example("resnet")
    model.train()
    model.layer1.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    with torch.inference_mode():
        units = Units.from_model(model, inputs)
    assert model.training
    assert not model.layer1[0].conv1.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert units.skipped["layer1.0.conv1"] == "frozen"
    assert "layer2.0.conv1" in units
