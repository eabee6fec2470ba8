"""Gates of all samples in one pass, against the gradients of weights, for every family of models."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cap.calibration.gate_rows import GateComputer, gate_gradients
from lightning_cap.calibration.rows import RowComputer
from lightning_cap.sparsity import Units
from lightning_cap.sparsity.units import gates_of
from tests.support.unit_families import FAMILIES, example, make
from tests.support.units import cross_entropy, images, small_net, small_units

pytest.importorskip("torch_pruning")

Batch = tuple[Tensor, Tensor]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_of_samples_are_those_of_weights(family: str) -> None:
    model, images = make(family), example(family, 4)
    units = Units.from_model(model, images[:1])
    targets = units.targets(model)
    batch = images, torch.arange(4) % 2
    computer = GateComputer(model, targets, _loss, 1, nullcontext, 8.0)
    rows = computer.at_once(batch)
    assert computer.shapes == {name: tuple(row.shape[1:]) for name, row in rows.items()}
    wanted = gate_gradients(
        units, targets.weights(), RowComputer(model, gates_of(targets), _loss, 1, nullcontext, 1.0).at_once(batch)
    )
    for name, row in rows.items():
        torch.testing.assert_close(row, wanted[name], rtol=1e-3, atol=1e-4 * float(wanted[name].abs().max()))
    assert computer._spots is not None  # the gates of samples were taken
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_loss_that_is_no_mean_over_samples_is_taken_off_the_weights() -> None:
    def weighted(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) * len(batch[1]) ** 2

    model, batch = small_net(), images(8)[0]
    targets = small_units().targets(model)
    computer = GateComputer(model, targets, weighted, 1, nullcontext, 1.0)
    rows = computer.at_once(batch)
    alone = [computer.one((batch[0][i : i + 1], batch[1][i : i + 1])) for i in range(len(batch[1]))]
    for name, row in rows.items():
        wanted = torch.cat([one[name] for one in alone])
        torch.testing.assert_close(row, wanted, rtol=1e-3, atol=1e-5)


def test_a_pass_back_computes_no_gradients_of_weights() -> None:
    """The fast way is taken, which calls the loss once per batch after it was compared."""
    calls = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[1]))
        return cross_entropy(model, batch)

    model, batch = small_net(), images(8)[0]
    computer = GateComputer(model, small_units().targets(model), counted, 1, nullcontext, 1.0)
    computer.at_once(batch)
    calls.clear()
    computer.at_once(batch)
    assert calls == [len(batch[1])]


def test_two_norms_in_a_row_are_one_gate() -> None:
    """Around a depthwise convolution: the gate is on what squeeze-excite and the next convolution read."""
    model, images = make("mobilenet_v3"), example("mobilenet_v3", 4)
    batch = images, torch.arange(4) % 2
    units = Units.from_model(model, images[:1])
    rows = GateComputer(model, units.targets(model), _loss, 1, nullcontext, 1.0).at_once(batch)
    seen = 0
    for name, group in units.items():
        norms = list(dict.fromkeys(part.name.rpartition(".")[0] for part in group.norms))
        if not any("conv_reduce" in part.name for part in group.consumers) or len(norms) != 2:
            continue
        seen += 1
        gates = torch.ones(4, group.size, requires_grad=True)
        norm = model.get_submodule(norms[-1])
        handle = norm.register_forward_hook(lambda _, args, out, gates=gates: out * gates[:, :, None, None])
        (true,) = torch.autograd.grad(4 * _loss(model, batch), gates)
        handle.remove()
        torch.testing.assert_close(rows[name], true, rtol=1e-3, atol=1e-3 * float(true.abs().max()))
    assert seen
