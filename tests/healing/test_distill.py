"""Healing by the dense model's outputs, against plain torch code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cap.errors import GradientError, TargetError
from lightning_cap.healing import DistillHeal, HealReport
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from tests.support.processes import on_ranks

pytestmark = pytest.mark.usefixtures("seeded")

SETTINGS: dict[str, Any] = {"num_inputs": 12, "steps": 5, "batch_size": 4, "lr": 1e-2}


def toy() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))
    return net.eval()


def inputs(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 2, 4, 4, generator=generator) for n in sizes]


def call(model: nn.Module, batch: Any) -> Tensor:
    out: Tensor = F.cross_entropy(model(batch[0]), torch.zeros(len(batch[0]), dtype=torch.long))
    return out


def prune(model: nn.Module) -> tuple[Targets, dict[str, Tensor], dict[str, Tensor]]:
    targets = Targets.from_model(model, include=["*.weight"], exclude=["*1.weight"])
    dense = targets.copies()
    generator = torch.Generator().manual_seed(2)
    masks = {name: torch.rand(w.shape, generator=generator) < 0.5 for name, w in targets.weights().items()}
    with torch.no_grad():
        for name, weight in targets.items():
            weight.mul_(masks[name])
    return targets, masks, dense


def expected(
    model: nn.Module, masks: dict[str, Tensor], x: list[Tensor], dense: nn.Module
) -> tuple[nn.Module, list[float]]:
    """The same by a plain loop, and the divergence before each step."""
    model, samples, apart = copy.deepcopy(model), torch.cat(x), []
    adam = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    for step in range(5):
        own = samples[[i % len(samples) for i in range(4 * step, 4 * step + 4)]]
        adam.param_groups[0]["lr"] = 1e-2 * (1 - step / 5)
        wanted = dense(own).softmax(1).detach()
        adam.zero_grad()
        loss = F.kl_div(model(own).log_softmax(1), wanted, reduction="batchmean")
        loss.backward()
        apart.append(loss.item())
        for name, mask in masks.items():
            grad = model.get_parameter(name).grad
            assert grad is not None
            grad.mul_(mask)
        adam.step()
    return model, apart


def heal(model: nn.Module, given: Any, x: list[Tensor], loss: Any = call, **more: Any) -> HealReport:
    run = {name: more.pop(name) for name in ("context", "progress") if name in more}
    return DistillHeal(**{**SETTINGS, **more}).run(model, *given, [(part,) for part in x], loss, **run)


@pytest.mark.parametrize("sizes", [(12,), (5, 3, 4)])
def test_steps_are_those_of_adam_towards_the_dense_outputs(sizes: tuple[int, ...]) -> None:
    model, dense, x, steps = toy(), toy(), inputs(*sizes), []
    given = prune(model)
    right, apart = expected(model, given[1], x, dense)
    report = heal(model, given, x, progress=lambda *step: steps.append(step))
    for (name, found), value in zip(model.state_dict().items(), right.state_dict().values(), strict=True):
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in given[1].items())
    assert torch.equal(model[1].running_mean, dense[1].running_mean)
    assert all(p.grad is None for p in model.parameters())
    assert (report.samples, report.passes) == (12, 12 + 20)
    assert report.stats == {
        "divergence_first": pytest.approx(apart[0], rel=1e-3),
        "divergence_last": pytest.approx(apart[-1], rel=1e-3),
        "steps_skipped": 0,
    }
    assert steps == [("heal", i, 5) for i in range(1, 6)]
    assert not model[0]._forward_hooks


def test_outputs_are_those_of_what_the_loss_calls_last() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.body, self.head = inner[:4], inner[4]

    def step(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model.head(model.body(batch[0])), torch.zeros(len(batch[0]), dtype=torch.long))

    plain, model, x = toy(), Wrapped(toy()).eval(), inputs(12)
    heal(plain, prune(plain), x)
    heal(model, prune(model), x, step)
    for value, found in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, value)


def test_outputs_may_be_in_a_dict_or_of_any_shape_for_squares() -> None:
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = toy()[:2]

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"other": x, "logits": self.net(x)}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        out: Tensor = model(batch[0])["logits"].sum()
        return out

    model, x = Boxes().eval(), inputs(12)
    given = prune(model)
    with pytest.raises(
        TargetError, match=r"loss='kl': the model's outputs have shape \(4, 6, 2, 2\), no logits.*loss='mse'"
    ):
        heal(model, given, x, loss)
    report = DistillHeal(num_inputs=12, steps=20, batch_size=12, lr=1e-2, loss="mse").run(
        model, *given, [(x[0],)], loss
    )
    assert report.stats["divergence_last"] < report.stats["divergence_first"]


def test_outputs_that_cannot_be_found_or_told_apart_are_refused() -> None:
    model, x = toy(), inputs(12)
    given = prune(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match="the loss calls no module that gives a tensor"):
        heal(model, given, x, lambda model, batch: batch[0].sum())
    with pytest.raises(TargetError, match=r"its outputs have shape \(5, 5\) for a batch of 12 samples"):
        heal(model, given, x, lambda model, batch: model(batch[0][:5]).sum())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_parameters_stay_and_bf16_is_moved_in_float32() -> None:
    model = toy().bfloat16()
    model[4].bias.requires_grad_(False)
    given, bias = prune(model), model[4].bias.clone()
    before = model[4].weight.detach().clone()
    heal(model, given, [x.bfloat16() for x in inputs(12)], steps=60, lr=1e-5)  # each step alone is below the last bit
    assert torch.equal(model[4].bias, bias)
    assert not torch.equal(model[4].weight, before)
    assert "4.bias" not in DistillHeal().parameters(model, given[0])


def test_steps_that_are_not_finite_are_left_out() -> None:
    model, x = toy(), inputs(4, 4, 4)
    given = prune(model)
    x[1][0, 0, 0, 0] = torch.inf
    report = heal(model, given, x, steps=3)
    assert report.stats["steps_skipped"] == 1
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    with pytest.raises(GradientError, match="gradients: none of the healing is finite"):
        heal(model, given, x[1:2], num_inputs=4)
    with pytest.raises(GradientError, match="the calibration batches are empty"):
        heal(model, given, [])


def in_parts(parts: list[list[int]]) -> tuple[dict[str, Tensor], HealReport]:
    model, x = toy(), inputs(2, 2, 2, 2, 2, 2)
    own = [x[i] for i in parts[distributed.rank()]]
    report = heal(model, prune(model), own)
    return model.state_dict(), report


def test_processes_end_with_the_same_bits_and_what_one_would_have(tmp_path: Path) -> None:
    alone, report = in_parts([[0, 1, 2, 3, 4, 5]])
    ranks = on_ranks(2, tmp_path, in_parts, [[0, 2, 4], [1, 3, 5]])
    assert ranks[0][1] == ranks[1][1]
    assert (ranks[0][1].samples, ranks[0][1].passes) == (report.samples, report.passes)
    for name, value in alone.items():
        assert torch.equal(ranks[0][0][name], ranks[1][0][name])
        torch.testing.assert_close(ranks[0][0][name], value, rtol=1e-3, atol=1e-4)
