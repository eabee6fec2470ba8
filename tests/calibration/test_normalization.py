from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.calibration.layer_inputs import InputCollector
from lightning_cap.calibration.normalization import PlainNormalization
from lightning_cap.sparsity.targets import Targets


class Tokens(nn.Module):
    """A convolution and a norm whose outputs become tokens: their gradient comes back with the strides of the tokens."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), norm, nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x)).flatten(2).transpose(1, 2))


def tokens(norm: nn.Module, training: bool = False) -> Tokens:
    torch.manual_seed(0)
    model = Tokens(norm).double().eval()
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            torch.nn.init.uniform_(tensor, 0.5, 2.0) if "mean" not in name else torch.nn.init.normal_(tensor)
    norm.train(training)
    return model


def loss(model: nn.Module, batch: Any) -> Tensor:
    weights = torch.linspace(-1, 1, 8, dtype=torch.float64)
    return (model(batch) * weights).sin().mean()


def finite_differences(model: Tokens, batch: Tensor, step: float = 1e-6) -> Tensor:
    flat, slopes = model.conv.weight.detach().view(-1), []
    with torch.no_grad(), PlainNormalization():
        for i in range(0, len(flat), 20):
            value = float(flat[i])
            flat[i] = value + step
            above = float(loss(model, batch))
            flat[i] = value - step
            slopes.append((above - float(loss(model, batch))) / (2 * step))
            flat[i] = value
    return torch.tensor(slopes)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(8),
    "without weights": lambda: nn.BatchNorm2d(8, affine=False),
    "timm": lambda: BatchNormAct2d(8, act_layer=nn.GELU),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
    "running instance": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
}


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_group_of_any_size_has_the_right_gradient(make: Callable[[], nn.Module], size: int) -> None:
    model = tokens(make())
    data = torch.randn(size, 3, 5, 5, dtype=torch.float64)
    targets = Targets({"conv.weight": model.conv.weight}, {"conv.weight": "conv.weight"})
    first = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    _, chunk = GradientCollector(
        model, targets, loss, [first, data], 2, 2
    )  # the last group of a data set may have one sample
    found = chunk["conv.weight"].flatten()[::20]
    torch.testing.assert_close(found, finite_differences(model, data), rtol=1e-4, atol=1e-6)


def test_the_loop_over_samples_has_the_right_gradients() -> None:
    class Branchy(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2.0 if float(x.sum()) > 0 else 1.0)  # which vmap cannot take

    model = tokens(nn.BatchNorm2d(8))
    model.__class__ = Branchy
    data = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    targets = Targets({"conv.weight": model.conv.weight}, {"conv.weight": "conv.weight"})
    with pytest.warns(UserWarning, match="vmap cannot take"):
        chunks = list(GradientCollector(model, targets, loss, [data], 3))
    for sample, chunk in zip(data, chunks, strict=True):
        expected = finite_differences(model, sample[None])
        torch.testing.assert_close(chunk["conv.weight"].flatten()[::20], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [*NORMS.values(), lambda: nn.BatchNorm2d(8, track_running_stats=False)])
@pytest.mark.parametrize("training", [False, True])
def test_it_computes_what_torch_does(make: Callable[[], nn.Module], training: bool) -> None:
    norm = tokens(make(), training).norm
    data = torch.randn(3, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items() if "running" in name}
    with PlainNormalization():
        plain = norm(data)
    assert all(torch.equal(norm.state_dict()[name], tensor) for name, tensor in before.items())
    torch.testing.assert_close(plain, norm(data))
    direction = torch.randn_like(plain)
    found, expected = (
        torch.autograd.grad(norm(data), data, direction)[0],
        torch.autograd.grad(plain, data, direction)[0],
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dims", [(), (6,), (3, 4, 5)])
def test_any_number_of_dimensions_and_half_precision(dims: tuple[int, ...]) -> None:
    kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[len(dims)]
    norm, data = kind(8).eval(), torch.randn(3, 8, *dims)
    norm.running_mean.normal_()
    for given, layer in ((data, norm), (data.bfloat16(), norm), (data.bfloat16(), kind(8).bfloat16().eval())):
        with PlainNormalization():
            plain = layer(given)
        assert plain.dtype == given.dtype
        torch.testing.assert_close(plain, layer(given))


def test_the_functions_of_torch_itself_and_what_it_refuses() -> None:
    data, mean, var = torch.randn(2, 3, 4), torch.randn(3), torch.rand(3) + 0.5
    given = (data, None, None, mean, var, False, 0.1, 1e-5, False)
    with PlainNormalization():
        plain = torch.batch_norm(*given)
        for norm, single in ((nn.BatchNorm1d(3), torch.ones(1, 3)), (nn.InstanceNorm1d(3), torch.ones(2, 3, 1))):
            with pytest.raises(ValueError, match="more than 1"):
                norm(single)
    torch.testing.assert_close(plain, torch.batch_norm(*given))
    assert torch.equal(torch.batch_norm(*given), torch.batch_norm(*given)), "as before outside"


def test_layer_inputs_are_those_of_the_same_forward_pass() -> None:
    model = tokens(nn.BatchNorm2d(8)).float()
    model.norm.running_mean += 1000  # a scale and a shift rounds otherwise than what torch computes
    model.last = nn.Linear(8, 4)
    data = torch.randn(2, 3, 5, 5)
    targets = Targets.from_model(model, include=["last.weight"])
    [grams] = InputCollector(model, targets, lambda m, batch: m(batch).mean(), [data], 2)
    with PlainNormalization(), torch.no_grad():
        x = model.norm(model.conv(data)).flatten(2).transpose(1, 2).reshape(-1, 8)
    torch.testing.assert_close(grams["last.weight"][0], x.T @ x, rtol=1e-6, atol=0)
