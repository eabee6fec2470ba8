"""Layer inputs against running the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor, nn

from lightning_cap import prune
from lightning_cap.calibration.layer_inputs import InputCollector
from lightning_cap.errors import TargetError
from lightning_cap.pruners import LayerwiseOBS
from lightning_cap.sparsity.targets import Targets
from tests.support.layers import LAYERS, collector, layer_of, output_energy, total

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("kind", LAYERS)
def test_grams_give_the_change_of_the_output(kind: str) -> None:
    """``||(W - W') X||^2``, by running the layer with ``W - W'``, is ``sum_o d_o^T G d_o``."""
    layer, shape = layer_of(kind)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, *shape, generator=generator) for n in (4, 3, 1)]
    gram = total(collector(layer, batches))
    groups = getattr(layer, "groups", 1)
    delta = torch.randn(layer.weight.shape, generator=generator)
    assert gram.shape == (groups, delta[0].numel(), delta[0].numel())
    moved = type(layer)(**_settings(layer)).requires_grad_(False)
    moved.weight.copy_(delta)
    rows = delta.double().flatten(1).unflatten(0, (groups, -1))  # (G, O/G, I)
    outputs = [moved(x).double().square() for x in batches]
    found = torch.einsum("goi,gij,goj->go", rows, gram, rows).flatten()
    dim = -1 if isinstance(layer, nn.Linear) else 1
    expected = sum(y.movedim(dim, 0).flatten(1).sum(1) for y in outputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _settings(layer: Any) -> dict[str, Any]:
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features, "bias": False}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {**{name: getattr(layer, name) for name in names}, "bias": False}


def test_collecting_under_autocast_keeps_full_precision() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    x = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    plain = next(iter(collector(layer, [x])))
    cast = next(iter(collector(layer, [x], context=lambda: torch.autocast("cpu", dtype=torch.bfloat16))))
    assert torch.equal(plain["0.weight"], cast["0.weight"]), "the first layer's inputs are the same"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inputs = layer[:2](x).float()
    torch.testing.assert_close(cast["2.weight"][0], inputs.T @ inputs, rtol=1e-4, atol=1e-4)


def test_collector_stops_in_time_and_can_be_read_again() -> None:
    batches = [torch.randn(8, 6) for _ in range(4)]
    seen: list[Any] = []
    source = collector(nn.Linear(6, 5), batches, 10, progress=lambda *step: seen.append(step))
    first, again = list(source), list(source)
    assert [grams.count for grams in first] == [8, 2]
    assert source.collected == 10
    assert source.repeatable
    assert not InputCollector(nn.Linear(6, 5), Targets.from_model(nn.Linear(6, 5), include=["weight"]), output_energy, iter(()), 8
                              ).repeatable  # fmt: skip
    assert seen[:2] == [("collect", 8, 10), ("collect", 10, 10)]
    assert all(torch.equal(a["weight"], b["weight"]) for a, b in zip(first, again, strict=True))
    assert source.memory().fixed >= 4 * 36


def test_too_few_inputs_are_told() -> None:
    with pytest.warns(UserWarning, match="num_inputs=100: the batches of this process gave only 32 samples"):
        list(collector(nn.Linear(6, 5), [torch.randn(8, 6) for _ in range(4)], 100))


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_sums_are_float32_whatever_the_default_type(precision: Any) -> None:
    layer = nn.Linear(6, 5).to(torch.bfloat16)
    inputs = [(100 * torch.randn(64, 6)).to(torch.bfloat16) for _ in range(3)]
    found = total(collector(layer, inputs, context=HalfPrecision(precision).train_step_context))
    expected = sum(x.double().T @ x.double() for x in inputs)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-2)


def test_a_layer_called_twice_counts_twice_and_hooks_are_taken_off() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input=self.inner(x))  # by keyword, too

    model, x = Twice(), torch.randn(9, 5)
    gram = total(collector(model, [x]), "inner.weight")[0]
    y = model.inner(x).detach()
    torch.testing.assert_close(gram.float(), x.T @ x + y.T @ y, rtol=1e-4, atol=1e-4)
    assert not model.inner._forward_pre_hooks


@pytest.mark.parametrize(
    ("model", "include", "kind"),
    [
        (nn.ModuleDict({"up": nn.ConvTranspose2d(2, 2, 2)}), "up.weight", "'up.weight' belongs to a ConvTranspose2d"),
        (nn.ModuleDict({"at": nn.MultiheadAttention(4, 2)}), "at.in_proj_weight",
         "'at.in_proj_weight' belongs to a MultiheadAttention"),
        (nn.ModuleDict({"c": nn.Conv3d(2, 2, 2)}), "c.weight", "'c.weight' belongs to a Conv3d"),
    ],
)  # fmt: skip
def test_other_layers_are_refused_by_name(model: nn.Module, include: str, kind: str) -> None:
    with pytest.raises(TargetError, match=rf"target {kind}.*exclude=\['{include}'\]"):
        InputCollector(model, Targets.from_model(model, include=[include]), output_energy, [], 8)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(TargetError, match=kind):
        prune(model, [], output_energy, 0.5, LayerwiseOBS(), include=[include], progress=False)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_layers_that_are_not_called_are_refused_by_name() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(*[self.used(x)] * 3)[0]

    model = Spare().eval()
    for name in (
        "spare.weight",
        "attention.out_proj.weight",
    ):  # the attention uses the weight, but does not call the layer
        with pytest.raises(TargetError, match=rf"the layers of 1, first '{name}', were not called"):
            prune(
                model,
                [(torch.randn(6, 4),)],
                output_energy,
                0.5,
                LayerwiseOBS(),
                include=["used.weight", name],
                progress=False,
            )
    assert not model.used._forward_pre_hooks
