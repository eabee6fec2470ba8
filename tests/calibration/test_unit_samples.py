"""Gradients of gates against real gates, and losses of pruned weights against a model that has them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_cap.calibration.layer_inputs import InputCollector
from lightning_cap.calibration.unit_samples import UnitInputs, UnitSamples
from lightning_cap.errors import ConfigError, GradientError, TargetError
from lightning_cap.sparsity import Targets
from lightning_cap.sparsity.units import consumers_of, gates_of
from tests.support.units import SmallNet, cross_entropy, images, small_net, small_units


@pytest.mark.parametrize("per_sample", [1, 4])
def test_gradients_are_those_of_gates(per_sample: int) -> None:
    model = small_net()
    targets, batches = small_units().targets(model), images(16)
    source = UnitSamples(16 // per_sample, per_sample).collector(model, targets, cross_entropy, batches)
    rows = {name: torch.cat([chunk[name] for chunk in list(source)]) for name in small_units()}
    assert source.collected == 16 // per_sample
    gated = copy.deepcopy(model)
    gated.gates = {name: torch.ones(size, requires_grad=True) for name, size in small_units().sizes.items()}
    wanted: dict[str, list[torch.Tensor]] = {name: [] for name in gated.gates}
    for x, y in batches:
        for start in range(0, len(x), per_sample):
            part = slice(start, start + per_sample)
            grads = torch.autograd.grad(cross_entropy(gated, (x[part], y[part])), list(gated.gates.values()))
            for name, grad in zip(gated.gates, grads, strict=True):
                wanted[name].append(grad)
    for name in rows:
        torch.testing.assert_close(rows[name], torch.stack(wanted[name]), rtol=1e-3, atol=1e-5)


def test_gates_are_read_off_few_weights() -> None:
    targets = small_units().targets(small_net())
    assert set(gates_of(targets)) == {"bn.weight", "bn.bias", "qkv.weight", "proj.weight", "fc2.weight"}
    assert set(consumers_of(targets)) == {"conv2.weight", "side.weight", "qkv.weight", "proj.weight", "fc2.weight"}
    with pytest.raises(TargetError, match="no units in them"):
        gates_of(Targets(dict(targets)))


def test_losses_are_those_of_a_model_with_these_weights() -> None:
    model = small_net()
    targets, batches = small_units().targets(model), images(24)
    source = UnitSamples(8, num_inputs=20).collector(model, targets, cross_entropy, batches)
    assert source.measures
    before = targets.copies()
    other = {"fc2.weight": torch.zeros_like(targets["fc2.weight"])}
    found = source.losses([{}, other, before])
    assert all(torch.equal(before[name], weight) for name, weight in targets.items())
    x, y = (torch.cat([batch[part] for batch in batches])[:20] for part in (0, 1))
    with torch.no_grad():
        dense = float(cross_entropy(model, (x, y)))
        model.fc2.weight.zero_()
        pruned = float(cross_entropy(model, (x, y)))
    assert found == pytest.approx([dense, pruned, dense], rel=1e-5)


def test_a_loss_that_is_random_is_the_same_for_all() -> None:
    def noisy(model: nn.Module, batch: Any) -> torch.Tensor:
        return cross_entropy(model, batch) * torch.rand(())

    model = small_net()
    source = UnitSamples(8, num_inputs=16).collector(model, small_units().targets(model), noisy, images(16))
    state = torch.get_rng_state()
    first, second = source.losses([{}, {}])
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_are_put_back_when_the_loss_fails() -> None:
    model = small_net()
    targets = small_units().targets(model)
    source = UnitSamples(8, num_inputs=8).collector(model, targets, lambda m, b: m(None), images(8))
    before = targets.copies()
    with pytest.raises(TypeError):
        source.losses([{"fc2.weight": torch.zeros(3, 12)}])
    assert all(torch.equal(before[name], weight) for name, weight in targets.items())


def test_inputs_are_those_of_the_layers_that_read_units() -> None:
    model = small_net()
    targets, batches = small_units().targets(model), images(20)
    found = UnitSamples(8, num_inputs=20).collector(model, targets, cross_entropy, batches).layer_inputs()
    alone = InputCollector(model, consumers_of(targets), cross_entropy, batches, 20)
    assert found.count == 20
    for name in consumers_of(targets):
        torch.testing.assert_close(found[name], sum(chunk[name].double() for chunk in alone))
    chunks = list(UnitInputs(20).collector(model, targets, cross_entropy, batches))
    assert [chunk.count for chunk in chunks] == [8, 8, 4]
    assert list(chunks[0]) == list(consumers_of(targets))


def test_layers_without_known_inputs_are_left_out() -> None:
    class Other(SmallNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            z = nn.functional.linear(x.mean((2, 3)).repeat(1, 4)[:, :7], self.fc1.weight, self.fc1.bias)
            return nn.functional.linear(z, self.fc2.weight)

    model = Other().eval()
    source = UnitSamples(8, num_inputs=8).collector(model, small_units().targets(model), cross_entropy, images(8))
    assert dict(source.layer_inputs()) == {}


def test_an_iterator_cannot_be_read_again() -> None:
    model = small_net()
    targets = small_units().targets(model)
    source = UnitSamples(8, num_inputs=8).collector(model, targets, cross_entropy, iter(images(8)))
    for ask in (source.layer_inputs, lambda: source.losses([{}])):
        with pytest.raises(GradientError, match=r"read only once.*compensate=False"):
            ask()


@pytest.mark.parametrize("number", [-1, 0.5, True, "8", None])
def test_settings_that_do_not_work(number: Any) -> None:
    with pytest.raises(ConfigError, match="num_inputs="):
        UnitSamples(8, num_inputs=number)
    with pytest.raises(ConfigError, match="n="):
        UnitSamples(number)
    assert UnitSamples(8, 2, 100).num_samples == 100
    assert UnitSamples(80, 2, 100).num_samples == 160
