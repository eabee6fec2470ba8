"""Healing layer after layer, against plain least squares for every row."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from torch import Tensor, nn

from lightning_cap.errors import CAPError, GradientError, TargetError
from lightning_cap.healing import HealReport, LayerwiseHeal
from lightning_cap.healing.base import biases_of
from lightning_cap.healing.rows import RowSolver
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from tests.references.healing import heal_layer
from tests.support.healing import waiting_threads
from tests.support.layers import LAYERS, layer_of, output_energy
from tests.support.processes import on_ranks

pytestmark = pytest.mark.usefixtures("seeded")


def pruned(model: nn.Module, sparsity: float, seed: int = 0) -> tuple[Targets, dict[str, Tensor], dict[str, Tensor]]:
    """Prune all layers at random, with noise on the kept weights; targets, masks, and what was dense."""
    generator = torch.Generator().manual_seed(seed)
    targets = Targets.from_model(model, include=["*weight"])
    dense = targets.copies() | {name: bias.detach().clone() for name, bias in biases_of(model, targets).items()}
    masks = {name: torch.rand(w.shape, generator=generator) >= sparsity for name, w in targets.weights().items()}
    with torch.no_grad():
        for name, weight in targets.items():
            noise = 0.1 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
            weight.copy_(torch.where(masks[name], weight + noise, 0.0))
    return targets, masks, dense


def heal(
    model: nn.Module,
    given: tuple[Targets, Mapping[str, Tensor], Mapping[str, Tensor]],
    inputs: list[Tensor],
    **more: Any,
) -> HealReport:
    settings = {"num_inputs": sum(map(len, inputs)), "ridge": 0.1, **more}
    run = {name: settings.pop(name) for name in ("context", "progress", "loss") if name in settings}
    loss = run.pop("loss", output_energy)
    return LayerwiseHeal(**settings).run(model.eval(), *given, [(x,) for x in inputs], loss, **run)


@pytest.mark.parametrize("sparsity", [0.2, 0.7])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_row_is_the_least_squares_solution(kind: str, sparsity: float) -> None:
    layer, shape = layer_of(kind)
    before = [torch.randn(n, *shape) for n in (4, 3, 1)]
    targets, masks, dense = pruned(layer, sparsity)
    weight, bias = heal_layer(layer, torch.cat(before), dense["weight"], dense.get("bias"), masks["weight"], 0.1)
    report = heal(layer, (targets, masks, dense), before)
    np.testing.assert_allclose(layer.weight.detach().flatten(1).numpy(), weight, rtol=1e-4, atol=1e-5)
    if bias is not None:
        np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-4, atol=1e-5)
    assert not layer.weight[~masks["weight"]].any()
    assert (report.samples, report.healed, report.left) == (8, ("weight",), {})
    assert 0 <= report.stats["output_error_after"] < report.stats["output_error_before"]


class Net(nn.Module):
    """Two convolutions and a linear layer, with something between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=2, bias=False)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.norm(self.second(x)) + x[:, :, 1:-1, 1:-1])
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def images(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 2, 6, 6, generator=generator) for n in sizes]


def test_each_layer_is_healed_on_what_the_healed_ones_before_give() -> None:
    model, x = Net().eval(), images(5, 3, 4)
    targets, masks, dense = pruned(model, 0.6)
    expected = copy.deepcopy(model)
    for name in ("first", "second", "head"):
        layer, seen = expected.get_submodule(name), []
        handle = layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            expected(torch.cat(x))
            handle.remove()
            key = f"{name}.weight"
            weight, bias = heal_layer(layer, seen[0], dense[key], dense.get(f"{name}.bias"), masks[key], 0.1)
            layer.weight.copy_(torch.from_numpy(weight).view_as(layer.weight))
            if bias is not None:
                layer.bias.copy_(torch.from_numpy(bias))
    steps: list[Any] = []
    report = heal(model, (targets, masks, dense), x, progress=lambda *step: steps.append(step))
    for (name, found), right in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert report.healed == ("first.weight", "second.weight", "head.weight")
    assert steps == [("heal", i, 3) for i in (1, 2, 3)]
    assert not model.first._forward_pre_hooks
    assert not waiting_threads()


def test_batches_may_be_cut_differently_and_only_the_first_samples_count() -> None:
    first, (x,) = Net().eval(), images(17)
    models = [first, copy.deepcopy(first), copy.deepcopy(first)]
    for model, sizes in zip(models, ([12], [5, 3, 4], [5, 3, 9]), strict=True):
        assert heal(model, pruned(model, 0.6), list(x[: sum(sizes)].split(sizes)), num_inputs=12).samples == 12
        for right, other in zip(first.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(other, right, rtol=1e-4, atol=1e-5)


def test_where_nothing_was_pruned_nothing_moves() -> None:
    model = Net().eval()
    targets = Targets.from_model(model, include=["*weight"])
    dense = targets.copies() | {name: bias.detach().clone() for name, bias in biases_of(model, targets).items()}
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in targets.shapes.items()}
    before = copy.deepcopy(model.state_dict())
    heal(model, (targets, masks, dense), images(4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():  # and a row that another stage has pruned before stays as it is
        dense["first.weight"][0, :, 0] = model.first.weight[0, :, 0] = 0.0
    masks["first.weight"][0, :, 0] = False
    before = copy.deepcopy(model.state_dict())
    heal(model, (targets, masks, dense), images(4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_too_few_samples_are_told_and_none_are_refused() -> None:
    model = Net().eval()
    given = pruned(model, 0.6)
    with pytest.warns(UserWarning, match="num_inputs=50: the batches of this process gave only 6 samples"):
        assert heal(model, given, images(4, 2), num_inputs=50).samples == 6
    with pytest.raises(GradientError, match="the calibration batches are empty"):
        heal(model, given, [], num_inputs=5)


def test_what_cannot_be_healed_is_left_and_told() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare, self.dead = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.attention, self.up = nn.MultiheadAttention(4, 2), nn.ConvTranspose1d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.used(x)
            x = self.attention(x, x, x)[0] + self.dead(0 * x)
            out: Tensor = self.up(x.mT).mT
            return out

    model = Odd().eval()
    targets, masks, dense = pruned(model, 0.5)
    before = copy.deepcopy(model.state_dict())
    report = heal(model, (targets, masks, dense), [torch.randn(6, 4)])
    kind, uncalled = "no plain Linear, Conv1d or Conv2d layer", "its layer is not called in the forward pass"
    assert report.healed == ("used.weight",)
    assert report.left == {
        "spare.weight": uncalled,
        "dead.weight": "its inputs are all zero",
        "attention.in_proj_weight": kind,
        "attention.out_proj.weight": uncalled,
        "up.weight": kind,
    }
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"used.weight", "used.bias"}


def test_frozen_biases_stay() -> None:
    layer = nn.Linear(6, 5)
    layer.bias.requires_grad_(False)
    x, before = torch.randn(20, 6) + 1, layer.bias.clone()
    targets, masks, dense = pruned(layer, 0.5)
    plain = nn.Linear(6, 5, bias=False)
    plain.weight = nn.Parameter(layer.weight.detach().clone())
    weight, _ = heal_layer(plain, x, dense["weight"], None, masks["weight"], 0.1)
    heal(layer, (targets, masks, dense), [x])
    assert torch.equal(layer.bias, before)
    np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_called_twice_is_healed_by_its_first_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(input=self.inner(x))  # by keyword, too
            return out

    model, x = Twice(), torch.randn(9, 5)
    targets, masks, dense = pruned(model, 0.5)
    weight, _ = heal_layer(model.inner, x, dense["inner.weight"], dense["inner.bias"], masks["inner.weight"], 0.1)
    heal(model, (targets, masks, dense), [x[:4], x[4:]])
    np.testing.assert_allclose(model.inner.weight.detach().numpy(), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_low_precision_is_solved_in_float32_and_cast_back(precision: str) -> None:
    layer, x = nn.Linear(6, 5), torch.randn(40, 6).bfloat16().float()
    if precision == "bf16":
        layer.bfloat16()
    targets, masks, dense = pruned(layer, 0.5)
    weight, bias = heal_layer(layer, x, dense["weight"], dense["bias"], masks["weight"], 0.1)
    seen: list[torch.dtype] = []
    layer.register_forward_hook(lambda _, args, out: seen.append(out.dtype))

    def context() -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast")

    heal(layer, (targets, masks, dense), [x.to(layer.weight.dtype)], context=context)
    assert set(seen) == {torch.bfloat16}
    expected = torch.from_numpy(weight).to(layer.weight.dtype)
    exact = layer.weight.dtype == torch.float32
    torch.testing.assert_close(layer.weight, expected, rtol=1e-4 if exact else 1e-2, atol=1e-5)
    torch.testing.assert_close(
        layer.bias, torch.from_numpy(bias).to(layer.bias.dtype), rtol=1e-4 if exact else 1e-2, atol=1e-5
    )


def test_what_a_context_sets_for_the_whole_process_is_as_before() -> None:
    layer = nn.Linear(6, 5).bfloat16()
    inputs = [torch.randn(7, 6).bfloat16() for _ in range(3)]
    heal(layer, pruned(layer, 0.5), inputs, context=HalfPrecision("bf16-true").train_step_context)
    assert torch.get_default_dtype() == torch.float32


def test_rows_whose_solution_is_not_finite_stay() -> None:
    layer, x = nn.Linear(3, 2).half(), torch.eye(3).half().repeat(4, 1)
    targets, masks, dense = pruned(layer, 0.0)
    dense["weight"] = dense["weight"].float()
    dense["weight"][0] = 1e30
    before = layer.weight.detach().clone()
    report = heal(layer, (targets, masks, dense), [x])
    assert torch.equal(layer.weight[0], before[0])
    assert not torch.equal(layer.weight[1], before[1])
    assert report.stats["rows_left"] == 1


def test_rows_that_were_solved_too_coarsely_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = RowSolver.solve

    def coarse(solver: RowSolver, rows: Tensor) -> Tensor:
        found = solve(solver, rows)
        found[1] += 10.0
        return found

    monkeypatch.setattr(RowSolver, "solve", coarse)
    layer = nn.Linear(3, 4)
    given = pruned(layer, 0.0)
    before = layer.weight.detach().clone()
    report = heal(layer, given, [torch.randn(20, 3)])
    assert (layer.weight == before).all(1).tolist() == [False, True, False, False]
    assert report.stats["rows_left"] == 1
    assert report.stats["output_error_after"] <= report.stats["output_error_before"]


def test_inputs_that_are_not_finite_are_refused() -> None:
    model = Net().eval()
    given, (x,) = pruned(model, 0.6), images(6)
    x[2, 1, 3, 3] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GradientError, match=r"inputs: those of the layer of 'first.weight' are not finite"):
        heal(model, given, [x])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.first._forward_pre_hooks
    assert not waiting_threads()


@pytest.mark.parametrize("where", [0, 2, 4])
def test_an_error_in_a_forward_pass_ends_all_of_them(where: int) -> None:
    """In the first part of a pass, between two layers, and after the last."""
    model, calls = Net().eval(), []
    given = pruned(model, 0.6)

    class OwnError(Exception):
        """Nobody else's."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(0)
        if where == 0 and len(calls) == 2:
            raise OwnError("in the loss")
        out = output_energy(model, batch)
        if where == 4 and len(batch[0]) == 3:
            raise OwnError("in the loss")
        return out

    def hook(module: nn.Module, args: Any) -> None:
        if where == 2 and len(args[0]) == 3:
            raise OwnError("in the model")

    model.norm.register_forward_pre_hook(hook)
    with pytest.raises(OwnError, match="in the "):
        heal(model, given, images(4, 3, 2), loss=loss)
    assert not model.first._forward_pre_hooks
    assert not waiting_threads()


def test_batches_that_call_the_layers_in_another_order_are_refused() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(x) if len(x) == 2 else self.b(self.a(x)) if len(x) == 3 else self.b(x)
            return out

    model = Routed()
    given = pruned(model, 0.5)
    with pytest.raises(TargetError, match=r"one batch calls the layer of 'a.weight' next where another has 'b.weight'"):
        heal(model, given, [torch.randn(2, 4), torch.randn(5, 4)])
    with pytest.raises(TargetError, match=r"one batch calls the layer of 'b.weight' next where another has its end"):
        heal(model, given, [torch.randn(2, 4), torch.randn(3, 4)])
    assert not waiting_threads()


def test_layers_that_are_called_in_a_thread_of_the_models_own_are_refused() -> None:
    class Threaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(1) as pool:
                out: Tensor = pool.submit(self.a, x).result()
            return out

    model = Threaded()
    with pytest.raises(TargetError, match=r"the layer of 'a.weight' is called in a thread that the model has started"):
        heal(model, pruned(model, 0.5), [torch.randn(2, 4)])


def test_generators_are_as_before_and_each_batch_goes_on_with_its_own() -> None:
    model, drawn = Net().eval(), {}
    given = pruned(model, 0.6)

    def batches() -> Iterator[Any]:
        for i, x in enumerate(images(3, 3)):
            torch.manual_seed(i)
            yield x, i

    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = output_energy(model, batch)
        drawn[batch[1]] = torch.rand(())
        return out

    state = torch.get_rng_state()
    LayerwiseHeal(num_inputs=6).run(model, *given, batches(), loss)
    assert torch.equal(torch.get_rng_state(), state)
    for i, value in drawn.items():
        assert torch.equal(value, torch.rand((), generator=torch.Generator().manual_seed(i)))


def in_parts(parts: list[list[int]], wrong: int | None = None) -> tuple[dict[str, Tensor], HealReport] | str:
    """Heal on this rank's batches; what went wrong, if something did."""
    torch.manual_seed(0)
    model, x = Net().eval(), images(4, 4, 4)
    given = pruned(model, 0.6)
    own = [x[i] for i in parts[distributed.rank()]]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        out = output_energy(model, batch)
        if wrong == distributed.rank():
            raise ValueError("a broken step")
        return out

    try:
        report = heal(model, given, own, num_inputs=24, loss=loss)
    except (CAPError, ValueError) as error:
        assert not waiting_threads()
        return f"{type(error).__name__}: {error}"
    return model.state_dict(), report


@pytest.mark.filterwarnings("ignore:num_inputs")
def test_processes_end_with_the_same_bits_and_what_one_would_have(tmp_path: Path) -> None:
    alone, report = in_parts([[0, 1, 2]])
    for parts in ([[0, 2], [1]], [[0, 1, 2], []]):
        ranks = on_ranks(2, tmp_path, in_parts, parts)
        assert [other.samples for _, other in ranks] == [12, 12] == 2 * [report.samples]
        assert ranks[0][1] == ranks[1][1]
        for name, value in alone.items():
            assert torch.equal(ranks[0][0][name], ranks[1][0][name])
            torch.testing.assert_close(ranks[0][0][name], value, rtol=1e-4, atol=1e-5)


def test_an_error_on_one_process_ends_all(tmp_path: Path) -> None:
    ranks = on_ranks(2, tmp_path, in_parts, [[0, 2], [1]], wrong=1)
    assert ranks == [
        "CAPError: Healing failed on another process; rank 1: ValueError: a broken step",
        "ValueError: a broken step",
    ]
