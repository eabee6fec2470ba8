"""Units of real models: what is found, and that they can go."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

from lightning_cap.errors import UnsupportedError
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


@pytest.mark.parametrize("family", ["vit", "convnext", "swin", "xcit"])
def test_streams_that_are_normalized_are_given_when_they_are_named(family: str) -> None:
    model, inputs = make(family), example(family)
    skipped = Units.from_model(model, inputs).skipped
    reasons = [reason for reason in skipped.values() if reason.startswith("normalized over its channels")]
    assert reasons
    names = {reason.split("'")[1] for reason in reasons}
    units = Units.from_model(model, inputs, include=sorted(names))
    assert set(units) == names
    assert {group.kind for group in units.values()} == {"channel"}
    _check((family, model, inputs, units), ("producers", "norms"))


def test_patches_that_are_merged_keep_their_channels() -> None:
    units = Units.from_model(make("swin"), example("swin"), include=["patch_embed.proj.stream"])
    read = {part.name: part.index for part in units["patch_embed.proj.stream"].consumers}
    assert read["layers.1.downsample.reduction.weight"][3].tolist() == [3, 19, 35, 51]


def test_names_choose_groups() -> None:
    model, inputs = make("vit"), example("vit")
    assert list(Units.from_model(model, inputs, include=["*.mlp"])) == ["blocks.0.mlp", "blocks.1.mlp"]
    units = Units.from_model(model, inputs, exclude=["blocks.1.*"])
    assert list(units) == ["blocks.0.attn", "blocks.0.mlp"]
    assert units.skipped["blocks.1.mlp.fc1"] == "not chosen"


def _skipped(model: nn.Module, inputs: Tensor) -> dict[str, str]:
    return Units.from_model(model, inputs).skipped


def test_what_cannot_be_cut_is_left_out_with_the_reason() -> None:
    convolutions = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1, groups=2), nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 1)), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    assert _skipped(convolutions, torch.randn(1, 3, 8, 8)) == {
        "0": "normalized in groups",
        "2": "a grouped convolution",
        "4": "its weight is computed",
        "6": "its weight is computed",
        "10": "an output of the model",
    }
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert _skipped(attention, torch.randn(1, 3, 8)) == {
        "linear2": "part of nn.MultiheadAttention",
        "self_attn": "nn.MultiheadAttention takes the size of its heads from its input",
    }
    shared = nn.Linear(4, 4)
    reused = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    assert _skipped(reused, torch.randn(1, 4)) == {"0": "used twice", "6": "an output of the model"}


class Gathered(nn.Module):
    """Reads its hidden channels in another order than it makes them, by their numbers, which no graph tells."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 5, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x).relu()[:, self.order]).relu())


def test_units_that_the_graph_gets_wrong_are_found_out() -> None:
    units = Units.from_model(Gathered(), torch.randn(2, 4))
    assert list(units) == ["fc2"]
    assert units.skipped["fc1"] == "its units cannot go one by one"


def test_a_depthwise_convolution_goes_with_its_channel() -> None:
    units = Units.from_model(make("mobilenet_v3"), example("mobilenet_v3"))
    group = units["blocks.1.0.conv_pw"]
    assert {part.name: part.dim for part in group.producers} == {
        "blocks.1.0.conv_pw.weight": 0,
        "blocks.1.0.conv_dw.weight": 0,
    }
    assert len(group.norms) == len(group.buffers) == 4
    layers = {layer.name: layer for layer in units.layers}
    assert [dict(width.per_unit) for width in layers["blocks.1.0.conv_dw"].widths] == [{"blocks.1.0.conv_pw": 1}]


def test_squeeze_and_excitation_goes_with_its_channel() -> None:
    units = Units.from_model(make("efficientnet_v2"), example("efficientnet_v2"))
    group = next(group for group in units.values() if "blocks.2.0.se.conv_expand.weight" in _names(group.producers))
    assert "blocks.2.0.se.conv_reduce.weight" in _names(group.consumers)
    assert {"blocks.2.0.conv_pw.weight", "blocks.2.0.conv_dw.weight"} <= _names(group.producers).keys()
    bottleneck = units["blocks.2.0.se"]
    assert _names(bottleneck.consumers).keys() == {"blocks.2.0.se.conv_expand.weight"}


def test_a_gate_that_is_half_of_a_layer_goes_with_the_other_half() -> None:
    group = Units.from_model(make("swiglu"), example("swiglu"))["mlp"]
    assert group.size == 10
    assert group.producers[0].index[3].tolist() == [3, 13]


def test_tables_of_heads_go_with_them() -> None:
    swin = Units.from_model(make("swin"), example("swin"))["layers.0.blocks.0.attn"]
    assert _names(swin.producers)["layers.0.blocks.0.attn.relative_position_bias_table"] == (1, (2, 1))
    xcit = Units.from_model(make("xcit"), example("xcit"))["blocks.0.attn"]
    assert _names(xcit.producers)["blocks.0.attn.temperature"] == (0, (4, 1))


def test_the_table_tells_what_a_unit_takes() -> None:
    model, inputs = make("mlp"), example("mlp")
    units = Units.from_model(model, inputs)
    first = units.records(model)[0]
    assert (first.name, first.kind, first.units, first.parameters, first.macs) == ("0", "neuron", 8, 6 + 1 + 7, 6 + 7)
    assert units.records()[0].parameters is None
    lines = units.table(model).splitlines()
    assert lines[0].split("  ")[0] == "group"
    assert lines[1].split() == ["0", "neuron", "8", "14", "13"]
    assert str(units).splitlines()[-1] == "left as it is: 4 (an output of the model)"
    assert units.targets(model).summary.startswith("15 neurons in 2 groups; ")


def test_without_torch_pruning_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UnsupportedError, match=r'pip install "lightning-cap\[structured\]"'):
        Units.from_model(make("mlp"), example("mlp"))


def test_a_graph_that_torch_pruning_cannot_make_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch_pruning

    def fail(*_: object, **__: object) -> None:
        raise IndexError("list index\nout of range")

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", fail)
    with pytest.raises(UnsupportedError, match="torch-pruning could not trace") as caught:
        Units.from_model(make("mlp"), example("mlp"))
    assert "\n" not in str(caught.value)


def test_units_of_a_compiled_model_have_plain_names() -> None:
    model = make("mlp")
    units = Units.from_model(nn.Sequential(torch.compile(model)), example("mlp"))
    assert {part.name for group in units.values() for part in group.slices} == {
        "0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias", "0.4.weight",
    }  # fmt: skip
    assert set(units.targets(nn.Sequential(torch.compile(model)))) >= {"0.0.weight"}


@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
def test_inputs_may_be_arguments(form: str) -> None:
    x = example("mlp")
    inputs = {"tuple": (x,), "list": [x], "dict": {"input": x}}[form]
    assert (
        Units.from_model(make("mlp"), inputs).flops == Units.from_model(make("mlp"), x[:1]).flops == 2 * (48 + 56 + 35)
    )
