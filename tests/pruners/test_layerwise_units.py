"""`LayerwiseUnits` against brute-force least squares after every removal."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_cap.calibration.layer_inputs import LayerGrams
from lightning_cap.errors import GradientError, TargetError
from lightning_cap.pruners.layerwise_units import LayerwiseUnits
from lightning_cap.sparsity import Targets, Units
from tests.references.unit_readers import eliminate_columns
from tests.support.units import WIDTH, cross_entropy, images, small_net, small_targets, small_units

#: Of each reader the kernel positions of a column, and the columns of a unit.
READERS = {
    "conv1": {"conv2.weight": (9, 1), "side.weight": (1, 1)},
    "conv2": {"qkv.weight": (1, 1)},
    "attn": {"proj.weight": (1, WIDTH)},
    "fc1": {"fc2.weight": (1, 1)},
}


def _inputs(targets: Targets, n: int = 120) -> dict[str, Tensor]:
    """``(n, I)`` correlated inputs of every reader."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name in (name for readers in READERS.values() for name in readers):
        x = torch.randn(n, targets[name][0].numel(), generator=generator).double()
        inputs[name] = x + 0.7 * x.roll(1, dims=1) + 0.3
    return inputs


def _grams(inputs: dict[str, Tensor]) -> list[LayerGrams]:
    chunk = LayerGrams({name: (x.T @ x).unsqueeze(0) for name, x in inputs.items()})
    chunk.count = len(next(iter(inputs.values())))
    return [chunk]


@pytest.mark.parametrize("damp", [1e-6, 0.01, 0.5])
def test_order_and_losses_are_those_of_brute_force(damp: float) -> None:
    targets = small_targets()
    inputs = _inputs(targets)
    path = LayerwiseUnits(damp=damp).path(targets, _grams(inputs))
    for name, readers in READERS.items():
        size = small_units()[name].size
        given = []
        for reader, (kernel, width) in readers.items():
            weight = targets[reader].detach().double().flatten(1).numpy()
            given.append((weight, inputs[reader].numpy(), np.arange(size).repeat(kernel * width)))
        order, losses = eliminate_columns(given, size, damp)
        taken = [removal for removal in path.removals if removal.group == name]
        assert [removal.unit for removal in taken] == order[:-1]
        assert [removal.loss for removal in taken] == pytest.approx(losses[:-1], rel=1e-4)


def test_a_group_that_is_read_in_two_halves_of_channels() -> None:
    """A convolution of two groups reads a unit in both."""
    units = small_units()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 2, 2, generator=generator)  # two groups of two rows, three inputs each
    part = dataclasses.replace(units["attn"].consumers[0], name="grouped.weight", index=torch.arange(3).unsqueeze(1))
    rows = dataclasses.replace(part, name="before.weight", dim=0, index=torch.tensor([[0, 3], [1, 4], [2, 5]]))
    group = dataclasses.replace(units["attn"], name="g", size=3, producers=(rows,), consumers=(part,))
    targets = Targets({"before.weight": torch.nn.Parameter(torch.randn(6, 2, generator=generator)),
                       "grouped.weight": torch.nn.Parameter(weight)})  # fmt: skip
    targets.units = Units([group])
    x = torch.randn(2, 50, 12, generator=generator).double()
    chunk = LayerGrams({"grouped.weight": x.mT @ x})
    chunk.count = 50
    path = LayerwiseUnits(damp=1e-6).path(targets, [chunk])
    both = weight.double().flatten(1).unflatten(0, (2, 2)).numpy()
    unit = np.arange(3).repeat(4)
    stacked = np.zeros((4, 24)), np.zeros((100, 24)), np.concatenate([unit, unit])
    for g in range(2):
        stacked[0][2 * g : 2 * g + 2, 12 * g : 12 * g + 12] = both[g]
        stacked[1][50 * g : 50 * g + 50, 12 * g : 12 * g + 12] = x[g].numpy()
    order, losses = eliminate_columns([stacked], 3, 1e-7)
    assert [removal.unit for removal in path.removals] == order[:-1]
    assert [removal.loss for removal in path.removals] == pytest.approx(losses[:-1], rel=1e-3)


def test_weights_are_fitted_to_the_outputs_of_before() -> None:
    targets = small_targets()
    inputs = _inputs(targets)
    result = LayerwiseUnits(damp=1e-9).path(targets, _grams(inputs)).at(0.6)
    for reader, x in inputs.items():
        weight, kept = targets[reader].detach().double().flatten(1), result.masks[reader].flatten(1)
        for row, mask, found in zip(weight, kept, result.weights[reader].flatten(1), strict=True):
            if mask.any():
                wanted = torch.linalg.lstsq(x[:, mask], x @ row).solution
                torch.testing.assert_close(found[mask], wanted.float(), rtol=1e-3, atol=1e-4)


def test_what_does_not_read_units_is_left_alone() -> None:
    targets = small_targets()
    result = LayerwiseUnits().path(targets, _grams(_inputs(targets))).at(0.6)
    readers = [name for group in READERS.values() for name in group]
    moved = {n for n, w in targets.items() if not torch.equal(result.weights[n], w * result.masks[n])}
    assert moved
    assert moved <= set(readers)


def test_units_that_are_pruned_already_are_out_of_the_play() -> None:
    targets = small_targets()
    inputs = _inputs(targets)
    kept = {name: torch.ones(size, dtype=torch.bool) for name, size in small_units().sizes.items()}
    kept["fc1"][[2, 5]] = False
    path = LayerwiseUnits(damp=0.01).path(targets, _grams(inputs), small_units().masks(targets.shapes, kept))
    left = kept["fc1"].nonzero().flatten().tolist()
    x = inputs["fc2.weight"][:, left].numpy()
    # the mean diagonal is that of all columns, those without inputs included
    damp = 0.01 * 10 / 12
    order, _ = eliminate_columns(
        [(targets["fc2.weight"].detach().double()[:, left].numpy(), x, np.arange(10))], 10, damp
    )
    assert [removal.unit for removal in path.removals if removal.group == "fc1"] == [left[u] for u in order[:-1]]


def test_on_a_model_outputs_stay_near() -> None:
    """Units of which one is the copy of another: without it, the fitted model gives the same."""
    model, batches = small_net(), images(40)
    with torch.no_grad():
        for tensor in (model.fc1.weight, model.fc1.bias):
            tensor[3] = tensor[8]
    targets = small_units().targets(model)
    pruner = LayerwiseUnits(num_inputs=40, damp=1e-6)
    source = pruner.statistic.collector(model, targets, cross_entropy, batches)
    path = pruner.path(targets, source)
    first = next(removal for removal in path.removals if removal.group == "fc1")
    assert first.unit in (3, 8)
    assert first.loss < 1e-3
    with torch.no_grad():
        before = model(batches[0][0])
        result = path.at(0.01)
        assert {removal.group for removal in path.removals[: int(result.stats["units"])]} == {"fc1"}
        result.apply(targets)
        torch.testing.assert_close(model(batches[0][0]), before, rtol=1e-2, atol=1e-2)


def test_sources_that_do_not_fit() -> None:
    targets = small_targets()
    chunk = _grams(_inputs(targets))[0]
    with pytest.raises(GradientError, match=r"needs layer statistics \(LayerGrams\), got dict"):
        LayerwiseUnits().path(targets, [dict(chunk)])
    del chunk["side.weight"]
    with pytest.raises(GradientError, match=r"no layer statistics of 'side\.weight'"):
        LayerwiseUnits().path(targets, [chunk])


def test_units_without_a_reader_are_refused() -> None:
    units = small_units()
    groups = [dataclasses.replace(g, consumers=()) if name == "attn" else g for name, g in units.items()]
    targets = Units(groups).targets(small_net())
    with pytest.raises(TargetError, match=r"no layer reads those of 'attn'.*exclude=\['attn'\]"):
        LayerwiseUnits().check(targets)
