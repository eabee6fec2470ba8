from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from lightning_cap import QATCallback
from lightning_cap.errors import ConfigError, TargetError
from lightning_cap.quantization.layers import (
    base_config,
    choose_layers,
    fake_quantized,
    make_plain,
    plain_linears,
    prepare,
)
from tests.support.quantizing import features, quantized_net, sparse_net

pytest.importorskip("torchao")


class OwnLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Zoo(nn.Module):
    """One of each kind of layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.attention = nn.MultiheadAttention(8, 2)
        self.block = nn.TransformerEncoderLayer(8, 2, 16)
        self.own = OwnLinear(4, 4)
        self.one = nn.Linear(1, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.hooked = nn.Linear(4, 4)
        self.hooked.register_forward_hook(lambda *_: None)
        self.good = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))


def test_what_torchao_cannot_take_is_named() -> None:
    names, left = choose_layers(Zoo(), None, None)
    assert names == ["good.0", "good.1"]
    assert left == {
        "conv.weight": "a Conv2d",
        "attention.in_proj_weight": "a MultiheadAttention",
        "attention.out_proj.weight": "read past its layer by MultiheadAttention",
        "block.self_attn.in_proj_weight": "a MultiheadAttention",
        "block.self_attn.out_proj.weight": "read past its layer by MultiheadAttention",
        "block.linear1.weight": "read past its layer by TransformerEncoderLayer",
        "block.linear2.weight": "read past its layer by TransformerEncoderLayer",
        "own.weight": "a OwnLinear with a forward of its own",
        "one.weight": "it has no two inputs",
        "hooked.weight": "it has hooks, which the swap would lose",
        "normed.weight": "a weight parametrized by WeightNorm",
    }


def test_patterns() -> None:
    assert choose_layers(Zoo(), ["good.*.weight", "conv.weight"], ["*.1.weight"]) == (
        ["good.0"],
        {"conv.weight": "a Conv2d"},
    )
    with pytest.raises(
        TargetError, match=r"include: 'god\.0\.weight' matches no parameter of the model. Near names: 'good"
    ):
        choose_layers(Zoo(), ["god.0.weight"], None)
    with pytest.raises(TargetError, match=r"no Linear layer left to quantize \(conv.weight: a Conv2d\)"):
        choose_layers(Zoo(), ["conv.weight"], None)
    with pytest.raises(TargetError, match="none is chosen"):
        choose_layers(nn.ReLU(), None, None)


def test_parameters_names_modes_and_random_numbers_stay() -> None:
    net = sparse_net()
    net[2].train()
    parameters, state = dict(net.named_parameters()), torch.get_rng_state()
    names = choose_layers(net, None, ["4.weight"])[0]
    prepare(net, names)
    assert list(fake_quantized(net)) == ["0", "2"]
    assert all(new is old for new, old in zip(net.parameters(), parameters.values(), strict=True))
    assert list(net.state_dict()) == list(parameters)
    assert [net[0].training, net[2].training] == [False, True]
    assert torch.equal(torch.get_rng_state(), state)
    once = net[0]
    prepare(net, names)
    assert net[0] is once
    with pytest.raises(ConfigError, match="the model has no Linear layer '1'"):
        prepare(net, ["1"])


def test_zeros_stay_exactly_zero() -> None:
    """In what the layers compute with, and in the integers; a row of zeros too."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    net = quantized_net()
    masks = {name: layer.weight == 0 for name, layer in fake_quantized(net).items()}
    for name, layer in fake_quantized(net).items():
        rounded = layer.weight_fake_quantizer(layer.weight)
        assert (rounded[masks[name]] == 0).all()
        assert not torch.equal(rounded, layer.weight)
    converted = copy.deepcopy(net)
    quantize_(converted, QATConfig(base_config(), step="convert"))
    for name, mask in masks.items():
        weight = converted.get_submodule(name).weight
        assert weight.qdata.dtype == torch.int8
        assert (weight.zero_point == 0).all()
        assert (weight.qdata[mask] == 0).all()
        assert (weight.dequantize()[mask] == 0).all()
    assert torch.isfinite(net(features())).all()
    torch.testing.assert_close(converted(features()), net(features()))


def test_plain_inside_for_the_fisher() -> None:
    """Rounding takes gradients of largest weights away, and cannot be vectorised; plain layers have both."""
    net, inputs = quantized_net(0.0), features()

    def gradient() -> torch.Tensor:
        net.zero_grad()
        net(inputs).square().sum().backward()
        return net[4].weight.grad.gather(1, net[4].weight.abs().argmax(1, keepdim=True))  # type: ignore[union-attr]

    assert (gradient() == 0).any()
    with plain_linears(net), plain_linears(net):
        assert not fake_quantized(net)
        assert (gradient() != 0).all()
        rows = vmap(grad(lambda p, x: functional_call(net, p, (x[None],)).sum()), (None, 0))
        assert rows({n: p.detach() for n, p in net.named_parameters()}, inputs)["0.weight"].shape == (6, 24, 16)
    assert list(fake_quantized(net)) == ["0", "2", "4"]


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"QATCallback needs the package torchao, not installed here: pip install 'lightning-cap\[quant",
    ):
        QATCallback()


def test_a_layer_of_two_names_is_swapped_under_both_and_back() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net.append(net[0])
    parameters, x = list(map(id, net.parameters())), torch.randn(3, 4)
    before = net(x)
    prepare(net, choose_layers(net, None, None)[0])
    assert net[3] is net[0]
    assert list(fake_quantized(net)) == ["0", "2", "3"]
    assert not torch.equal(net(x), before)
    make_plain(net, keep=["2"])
    assert list(fake_quantized(net)) == ["2"]
    make_plain(net)
    assert net[3] is net[0]
    assert type(net[0]) is nn.Linear
    assert torch.equal(net(x), before)
    assert list(map(id, net.parameters())) == parameters
