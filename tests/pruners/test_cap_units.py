"""`CAPUnits` against a textbook Optimal Brain Surgeon on gates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_cap.pruners import CAPUnits
from tests.references.units import best_gates, eliminate_gates, gate_fisher
from tests.support.units import gate_rows, small_targets, small_units


def _rows_of(rows: list[dict[str, torch.Tensor]], name: str) -> np.ndarray:
    return np.concatenate([chunk[name].double().numpy() for chunk in rows])


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize(("n", "damp"), [(60, 1e-2), (5, 1e-2), (60, 1e-4)])
def test_order_losses_and_gates_are_the_textbooks(n: int, damp: float, scale: float) -> None:
    targets = small_targets()
    rows = gate_rows(small_units(), n, scale=scale)
    masks = {"fc1.weight": torch.ones(12, 7, dtype=torch.bool)}
    path = CAPUnits(damp=damp).path(targets, rows, masks)
    result = path.at(0.6)
    for name, group in small_units().items():
        everything = np.ones(group.size, dtype=bool)
        fisher = gate_fisher(_rows_of(rows, name), everything, damp)
        order, losses = eliminate_gates(fisher, everything)
        taken = [removal for removal in path.removals if removal.group == name]
        assert [removal.unit for removal in taken] == order[:-1], "one unit stays"
        assert [removal.loss for removal in taken] == pytest.approx(losses[:-1], rel=2e-3)
        gone = ~small_units().kept(result.masks)[name].numpy()
        gates = torch.from_numpy(best_gates(fisher, everything, gone)).float()
        for part in group.gates:
            factors = torch.ones(targets[part.name].shape[part.dim])
            factors[part.index] = gates.unsqueeze(1).expand(-1, part.index.shape[1])
            shape = [-1 if dim == part.dim else 1 for dim in range(targets[part.name].dim())]
            others = result.masks[part.name]  # units of other groups are pruned in the same weight
            wanted = targets[part.name] * factors.view(shape) * others
            if part.name != "qkv.weight":
                torch.testing.assert_close(result.weights[part.name], wanted, rtol=2e-3, atol=1e-5)


def test_units_that_are_pruned_already_are_not_in_the_fisher() -> None:
    targets, rows = small_targets(), gate_rows(small_units(), 60)
    kept = {name: torch.ones(size, dtype=torch.bool) for name, size in small_units().sizes.items()}
    kept["fc1"][[2, 5]] = False
    path = CAPUnits().path(targets, rows, small_units().masks(targets.shapes, kept))
    there = kept["fc1"].numpy()
    order, _ = eliminate_gates(gate_fisher(_rows_of(rows, "fc1"), there, 0.01), there)
    assert [removal.unit for removal in path.removals if removal.group == "fc1"] == order[:-1]
    assert torch.equal(path.at(0.0).weights["fc2.weight"], targets["fc2.weight"] * kept["fc1"])


def test_of_two_units_that_do_the_same_one_takes_over() -> None:
    """Single saliencies are as large as others'; together they are not needed."""
    rows = gate_rows(small_units(), 200)
    for chunk in rows:
        chunk["fc1"][:, 7] = chunk["fc1"][:, 4]
        chunk["fc1"] *= 1e-2
    targets = small_targets()
    path = CAPUnits(damp=1e-5).path(targets, rows)
    first, second = (r for r in path.removals if r.group == "fc1" and r.unit in (4, 7))
    assert path.removals[0] is first
    assert first.loss < 1e-3 * second.loss
    result = path.at(first.saved)
    other = 11 - first.unit
    torch.testing.assert_close(
        result.weights["fc2.weight"][:, other], 2 * targets["fc2.weight"][:, other], rtol=1e-3, atol=1e-4
    )


def test_damp_follows_the_scale_of_the_gradients() -> None:
    one, other = (CAPUnits().path(small_targets(), gate_rows(small_units(), 30, scale=s)).at(0.5) for s in (1, 1e-5))
    assert all(torch.equal(one.masks[n], other.masks[n]) for n in one.masks)
    for name, weight in one.weights.items():
        torch.testing.assert_close(other.weights[name], weight, rtol=1e-3, atol=1e-4)


def test_the_prediction_is_that_of_a_quadratic_loss() -> None:
    """A model that is linear in one gate per unit: its loss is ``½ Σ_k (g_k (q - 1))² / N``, as the Fisher says."""
    rows, targets = gate_rows(small_units(), 100), small_targets()
    path = CAPUnits(damp=1e-7).path(targets, rows)
    result = path.at(0.5)
    total = 0.0
    for name, group in small_units().items():
        gone = ~small_units().kept(result.masks)[name].numpy()
        fisher = gate_fisher(_rows_of(rows, name), np.ones(group.size, dtype=bool), 1e-7)
        move = best_gates(fisher, np.ones(group.size, dtype=bool), gone) - 1
        total += float(0.5 * np.mean((_rows_of(rows, name) @ move) ** 2))
    assert result.predicted_loss == pytest.approx(total, rel=1e-2)
