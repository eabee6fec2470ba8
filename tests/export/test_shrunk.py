from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cap.errors import ConfigError, UnsupportedError
from lightning_cap.export import shrink
from lightning_cap.sparsity import Flops, MaskSet
from lightning_cap.sparsity.narrow_attention import NarrowClassAttention, NarrowXCA
from lightning_cap.sparsity.units import Units
from lightning_cap.utilities.flops import count_flops
from tests.support.shrinking import group, mask, shapes_of, some_kept, unsettle
from tests.support.unit_families import FAMILIES, example, make

Case = tuple[nn.Module, Units, Tensor]
_traced: dict[str, Case] = {}


@pytest.fixture
def traced() -> Callable[[str], Case]:
    """A model, all its units, those of streams that pass a LayerNorm too, and inputs; found once for all tests."""
    pytest.importorskip("torch_pruning")

    def trace(name: str) -> Case:
        if name not in _traced:
            model, inputs = unsettle(make(name)), example(name)
            _traced[name] = model, Units.from_model(model, inputs, include=["*"]), inputs
        return _traced[name]

    return trace


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().abs().max() / want.detach().abs().max())


def masks_of(units: Units, model: nn.Module, seed: int = 0, share: float = 0.5) -> dict[str, Tensor]:
    return units.masks(units.targets(model).shapes, some_kept(units, seed, share))


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_are_those_of_the_masked_model(name: str, traced: Callable[[str], Case]) -> None:
    model, units, inputs = traced(name)
    before = copy.deepcopy(model.state_dict())
    for seed, share in ((0, 0.6), (1, 0.01)):
        masks = masks_of(units, model, seed, share)
        small = shrink(model, masks, units, inputs)
        with torch.no_grad():
            want, got = mask(copy.deepcopy(model), masks)(inputs), small(inputs)
        assert relative(want, model(inputs)) > 1e-3, "the masks change nothing"
        assert relative(got, want) <= 1e-5
    assert torch.equal(pickle.loads(pickle.dumps(small))(inputs), got)
    assert torch.equal(copy.deepcopy(small)(inputs), got)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["vit", "convnext_v2"])
def test_the_smaller_model_is_traced_and_shrunk_again(name: str, traced: Callable[[str], Case]) -> None:
    """Norms that count channels which are gone do not stand in the way."""
    model, units, inputs = traced(name)
    kept = {group: torch.arange(members.size) < max(2, members.size * 3 // 4) for group, members in units.items()}
    small = shrink(model, units.masks(units.targets(model).shapes, kept), units, inputs)
    left = Units.from_model(small, inputs, include=["*"])
    assert left.sizes == {group: int(which.sum()) for group, which in kept.items()}
    masks = masks_of(left, small)
    smaller = shrink(small, masks, left, inputs)
    assert relative(smaller(inputs), mask(copy.deepcopy(small), masks)(inputs)) <= 1e-5


@pytest.mark.parametrize("fused", [True, False])
def test_attention_across_channels_and_of_the_class_takes_fewer_heads(
    traced: Callable[[str], Case], fused: bool
) -> None:
    model, units, inputs = traced("xcit")
    model = copy.deepcopy(model)
    attentions = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for attention in attentions:
        attention.fused_attn = fused
    heads = {name: torch.arange(group.size) < 3 for name, group in units.items() if group.kind == "head"}
    assert len(heads) == len(attentions) == 3
    whole = {name: torch.ones(group.size, dtype=torch.bool) for name, group in units.items()}
    masks = units.masks(units.targets(model).shapes, whole | heads)
    small = shrink(model, masks, units, inputs)
    assert relative(small(inputs), mask(copy.deepcopy(model), masks)(inputs)) <= 1e-5
    kinds = [type(module) for module in small.modules() if hasattr(module, "fused_attn")]
    assert kinds == [NarrowXCA, NarrowClassAttention, NarrowClassAttention]


@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_as_much_as_flops_says(name: str, traced: Callable[[str], Case]) -> None:
    model, units, inputs = traced(name)
    prices = Flops().unit_prices(units, units.targets(model).shapes)
    assert count_flops(model, inputs[:1]) == prices.total
    for seed in (0, 1):
        kept = some_kept(units, seed, share=(0.6, 0.01)[seed])
        small = shrink(model, units.masks(units.targets(model).shapes, kept), units, inputs)
        want = prices.of({group: int(which.sum()) for group, which in kept.items()})
        assert count_flops(small, inputs[:1]) == want < prices.total


@pytest.mark.parametrize("name", FAMILIES)
def test_the_smaller_model_trains_on(name: str, traced: Callable[[str], Case]) -> None:
    model, units, inputs = traced(name)
    small = shrink(model, masks_of(units, model), units, inputs)
    optimizer = torch.optim.Adam(small.parameters(), lr=1e-4)
    losses = []
    for _ in range(4):
        loss = F.cross_entropy(small(inputs), torch.tensor([0, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "vit" else pytest.mark.slow) for name in FAMILIES]
)
def test_torch_exports_the_smaller_model(name: str, traced: Callable[[str], Case]) -> None:
    model, units, inputs = traced(name)
    small = shrink(model, masks_of(units, model), units, inputs)
    program = torch.export.export(small, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = torch.cat([inputs, inputs, inputs])
    assert relative(program.module()(more), small(more)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_runs_the_smaller_model(name: str, traced: Callable[[str], Case], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, units, inputs = traced(name)
    small = shrink(model, masks_of(units, model), units, inputs)
    file = tmp_path / "small.onnx"
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(small, (inputs,), file, dynamo=True, dynamic_shapes=batch, external_data=False, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    more = torch.cat([inputs, inputs, inputs])
    (out,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
    assert relative(torch.from_numpy(out), small(more)) <= 1e-4


class Lit(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.fixture
def vit_masks(tiny_vit: nn.Module) -> tuple[nn.Module, Units, dict[str, Tensor]]:
    """A small ViT without half the neurons of one block."""
    unsettle(tiny_vit)
    fc1 = [("blocks.0.mlp.fc1.weight", 0), ("blocks.0.mlp.fc1.bias", 0)]
    units = Units([group("blocks.0.mlp", "neuron", 64, fc1, [], [("blocks.0.mlp.fc2.weight", 1)], shapes_of(tiny_vit))])
    masks = units.masks(units.targets(tiny_vit).shapes, {"blocks.0.mlp": torch.arange(64) % 2 == 0})
    return tiny_vit, units, masks


def test_zeros_inside_of_kept_units_survive(vit_masks: tuple[nn.Module, Units, dict[str, Tensor]]) -> None:
    model, units, masks = vit_masks
    generator = torch.Generator().manual_seed(0)
    for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"):
        masks[name] &= torch.rand(masks[name].shape, generator=generator) < 0.6
    x = torch.randn(2, 3, 16, 16)
    small = shrink(model, masks, units)
    assert relative(small(x), mask(copy.deepcopy(model), masks)(x)) <= 1e-5
    weight = small.get_parameter("blocks.0.mlp.fc1.weight")
    assert torch.equal(weight != 0, masks["blocks.0.mlp.fc1.weight"][::2])
    assert 0.3 < (weight == 0).float().mean() < 0.5


def prefixed(units: Units, prefix: str) -> Units:
    state = units.state_dict()
    for entry in state["groups"]:
        entry["name"] = prefix + entry["name"]
        for role in ("producers", "norms", "consumers", "buffers"):
            entry[role] = [[prefix + name, dim, index] for name, dim, index in entry[role]]
    return Units.from_state(state)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_model_in_a_lightning_module_is_taken(
    vit_masks: tuple[nn.Module, Units, dict[str, Tensor]], compiled: bool
) -> None:
    model, units, masks = vit_masks
    module = Lit(torch.compile(model) if compiled else model)  # type: ignore[arg-type]
    module.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    outer, longer = prefixed(units, "model."), {f"model.{name}": value for name, value in masks.items()}
    of_outer = MaskSet(outer.targets(module))
    of_outer.update(longer)
    x = torch.randn(2, 3, 16, 16)
    want = mask(copy.deepcopy(model), masks)(x)
    cases: list[tuple[Any, ...]] = [
        (module, longer, outer), (module, longer, units), (module, masks, units), (module, of_outer), (model, of_outer),
        (model, longer, outer), (model, masks, units), (model, masks, outer),
    ]  # fmt: skip
    for case in cases:
        small = shrink(*case)
        assert type(small) is type(model)
        assert small.blocks[0].mlp.fc1.out_features == 32  # type: ignore[index, union-attr]
        assert relative(small(x), want) <= 1e-5


def test_a_lightning_module_that_is_the_model_leaves_its_trainer_behind() -> None:
    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())  # type: ignore[no-any-return]

    net = Net()
    net.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    units = Units([group("a", "neuron", 6, [("a.weight", 0), ("a.bias", 0)], [], [("b.weight", 1)], shapes_of(net))])
    masks = units.masks(units.targets(net).shapes, {"a": torch.arange(6) < 4})
    small = shrink(net, masks, units, torch.randn(2, 4))
    assert small.a.out_features == 4  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="not attached"):
        _ = small.trainer
    assert net.trainer is not None


def test_a_timm_model_needs_neither_units_nor_an_example() -> None:
    pytest.importorskip("torch_pruning")
    model = unsettle(
        timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2, in_chans=1)
    )
    model.train()
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for name, rows in (
        ("fc1.weight", slice(9, 64)),
        ("fc1.bias", slice(9, 64)),
        ("fc2.weight", (slice(None), slice(9, 64))),
    ):
        masks[f"blocks.0.mlp.{name}"][rows] = False
    small = shrink(model, masks)
    assert small.blocks[0].mlp.fc1.out_features == 9  # type: ignore[index, union-attr]
    assert small.training
    assert small.norm.training  # type: ignore[union-attr]


def test_without_a_pruned_unit_there_is_a_warning(vit_masks: tuple[nn.Module, Units, dict[str, Tensor]]) -> None:
    model, units, masks = vit_masks
    with pytest.warns(UserWarning, match="no unit is pruned"):
        small = shrink(model, {name: torch.ones_like(value) for name, value in masks.items()}, units)
    assert shapes_of(small) == shapes_of(model)


def test_a_broken_unit_is_named(vit_masks: tuple[nn.Module, Units, dict[str, Tensor]]) -> None:
    model, units, masks = vit_masks
    masks["blocks.0.mlp.fc2.weight"][3, 1] = True
    with pytest.raises(ConfigError, match=r"masks: 1 units of 'blocks.0.mlp', first 1, are masked in part"):
        shrink(model, masks, units)


def test_masks_and_units_of_another_model_are_refused(
    vit_masks: tuple[nn.Module, Units, dict[str, Tensor]], tiny_cnn: nn.Module
) -> None:
    model, units, masks = vit_masks
    with pytest.raises(ConfigError, match=r"masks: 'blocks.0.mlp.fc1.weight' is no parameter of the model"):
        shrink(tiny_cnn, masks, units)
    own = {name: torch.ones_like(p, dtype=torch.bool) for name, p in tiny_cnn.named_parameters()}
    with pytest.raises(ConfigError, match=r"units: 'blocks.0.mlp.fc1.weight' is no parameter of the model"):
        shrink(tiny_cnn, own, units)
    small = shrink(model, masks, units)
    with pytest.raises(
        ConfigError, match=r"masks: 'blocks.0.mlp.fc1.weight' has shape \(64, 16\), but its weight has \(32, 16\)"
    ):
        shrink(small, masks, units)


def two_layers(forward: Callable[[Any, Tensor], Tensor]) -> tuple[nn.Module, Units, dict[str, Tensor]]:
    net = type("Net", (nn.Module,), {"forward": forward})()
    net.a, net.b = nn.Linear(4, 6), nn.Linear(6, 2)
    units = Units([group("a", "neuron", 6, [("a.weight", 0), ("a.bias", 0)], [], [("b.weight", 1)], shapes_of(net))])
    return net, units, units.masks(units.targets(net).shapes, {"a": torch.arange(6) < 4})


def test_a_model_that_cannot_do_without_its_units_is_refused() -> None:
    x = torch.randn(2, 4)
    net, units, masks = two_layers(lambda self, x: self.b(self.a(x).view(-1, 6)))
    with pytest.raises(UnsupportedError, match="cannot be run without its pruned units"):
        shrink(net, masks, units, x)
    net, units, masks = two_layers(lambda self, x: self.b(self.a(x) - self.a(x).mean(1, keepdim=True)))
    with pytest.raises(UnsupportedError, match="differs from the masked model"):
        shrink(net, masks, units, x)
    with pytest.raises(ConfigError, match=r"example_input=tensor of shape \(2, 5\): the model cannot be run on it"):
        shrink(net, masks, units, torch.randn(2, 5))
    with pytest.raises(ConfigError, match=r"example_input=None: without it the units of this model cannot be found"):
        shrink(net, masks)
