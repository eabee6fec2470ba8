"""The fit of layers behind pruned units against brute-force least squares on their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cap.calibration.layer_inputs import LayerGrams
from lightning_cap.calibration.unit_samples import UnitSamples
from lightning_cap.errors import GradientError
from lightning_cap.pruners import CAPUnits
from lightning_cap.pruners.unit_compensation import best, compensate, least_squares
from lightning_cap.sparsity import Targets
from tests.support.problems import random_masks
from tests.support.units import cross_entropy, gate_rows, images, small_net, small_targets, small_units

CONSUMERS = ("conv2.weight", "side.weight", "qkv.weight", "proj.weight", "fc2.weight")


def _rows_of_inputs(layer: Any, x: Tensor) -> Tensor:
    """``(G, N, n)``: what each row of a group's weight is multiplied by."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    columns = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return columns.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "tokens": (lambda: nn.Linear(6, 4, bias=False), (5, 6)),
    "conv": (lambda: nn.Conv2d(5, 4, 3, padding=1, stride=2), (5, 7, 7)),
    "grouped": (lambda: nn.Conv2d(8, 6, 3, groups=2), (8, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(6, 4, 1), (6, 3, 3)),
}


@pytest.mark.parametrize("single_zeros", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_fit_is_least_squares(kind: str, single_zeros: bool) -> None:
    make, shape = LAYERS[kind]
    generator = torch.Generator().manual_seed(0)
    layer: Any = make()
    layer.double().requires_grad_(False)
    x = torch.randn(60, *shape, generator=generator, dtype=torch.float64)
    x = x + x.roll(1, dims=1)  # so that inputs can stand in for each other
    inputs = _rows_of_inputs(layer, x)
    mask = torch.ones(layer.weight.shape, dtype=torch.bool)
    mask[:, [0, 2]] = False
    mask[1] = False  # the row of a unit of another group
    if single_zeros:
        mask &= random_masks({"weight": mask}, 0.3)["weight"]
        layer.weight.mul_(random_masks({"weight": mask}, 0.2, seed=5)["weight"])
    found = least_squares(layer.weight, mask, inputs.mT @ inputs, 1e-12)
    assert not found[~mask].any()
    groups = len(inputs)
    for o, (row, kept) in enumerate(zip(layer.weight.flatten(1), mask.flatten(1), strict=True)):
        own = inputs[o // (len(mask) // groups)]
        wanted = torch.linalg.lstsq(own[:, kept], own @ row).solution if kept.any() else row[kept]
        torch.testing.assert_close(found.flatten(1)[o][kept], wanted, rtol=1e-5, atol=1e-7)


def test_what_inputs_say_little_about_stays() -> None:
    """Two samples of eight inputs: outputs are kept, and weights move no further than they must."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 8, generator=generator).double(), torch.randn(3, 8, generator=generator)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[:, 3] = False
    found = least_squares(weight, mask, (x.T @ x).unsqueeze(0), 1e-9)
    torch.testing.assert_close(found @ x.T, weight.double() @ x.T, rtol=1e-5, atol=1e-6)
    kept = torch.linalg.lstsq(x[:, mask[0]], (weight[:, 3:4].double() @ x[:, 3:4].T).T, driver="gelsd").solution.T
    torch.testing.assert_close(found[:, mask[0]], weight[:, mask[0]] + kept, rtol=1e-5, atol=1e-6)
    assert torch.equal(least_squares(weight, mask, torch.zeros(1, 8, 8).double(), 0.1), weight.double() * mask)
    large = least_squares(weight, mask, (x.T @ x).unsqueeze(0), 1e9)
    torch.testing.assert_close(large, weight.double() * mask, rtol=1e-6, atol=1e-6)


def test_sums_that_do_not_factor_get_more_damp() -> None:
    """Rounding can make sums of products slightly negative in a direction."""
    gram = torch.diag(torch.tensor([1.0, 1.0, -1e-3], dtype=torch.float64)).unsqueeze(0)
    gram[0, 0, 1] = gram[0, 1, 0] = 0.5
    mask = torch.tensor([[False, True, True]])
    found = least_squares(torch.ones(1, 3), mask, gram, 1e-6)
    assert found.isfinite().all()
    assert found[0, 1] > 1.2
    assert found[0, 2] == pytest.approx(1.0)


def test_only_readers_of_pruned_units_are_fitted() -> None:
    targets = small_targets()
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in targets.items()}
    grams = {name: torch.eye(targets[name][0].numel()).double().unsqueeze(0) for name in CONSUMERS[:4]}
    units = small_units()
    assert set(compensate([units["conv1"]], targets, masks, grams, 0.1)) == {"conv2.weight", "side.weight"}
    assert compensate([units["fc1"]], targets, masks, grams, 0.1) == {}
    same = compensate(list(units.values()), targets, masks, grams, 0.1)
    assert all(torch.equal(weight.float(), targets[name]) for name, weight in same.items()), "nothing is pruned"


class Source:
    """Gate gradients, layer inputs, and losses that are given."""

    measures = True

    def __init__(self, *losses: float, readers: Sequence[str] = CONSUMERS) -> None:
        self._losses, self._readers, self.candidates = list(losses), readers, []

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        return iter(gate_rows(small_units(), 40))

    def layer_inputs(self) -> LayerGrams:
        generator = torch.Generator().manual_seed(0)
        grams = LayerGrams()
        for name in self._readers:
            x = torch.randn(200, small_targets()[name][0].numel(), generator=generator).double()
            x += x.roll(1, dims=1)
            grams[name] = (x.T @ x).unsqueeze(0)
        return grams

    def losses(self, candidates: Sequence[Mapping[str, Tensor]]) -> list[float]:
        self.candidates = list(candidates)
        return self._losses


@pytest.mark.parametrize(
    ("losses", "fitted"),
    [((2.0, 1.0), True), ((1.0, 2.0), False), ((1.0, 1.0), False), ((1.0, float("nan")), False),
     ((float("inf"), 3.0), True)],
)  # fmt: skip
def test_the_fit_is_taken_where_it_lowers_the_loss(losses: tuple[float, float], fitted: bool) -> None:
    targets, source = small_targets(), Source(*losses)
    result = CAPUnits().path(targets, source).at(0.5)
    assert result.stats["compensated"] == fitted
    assert len(source.candidates) == 2
    assert all(torch.equal(result.weights[n], source.candidates[fitted][n]) for n in targets), "what was measured"
    folded = CAPUnits(compensate=False).path(targets, Source()).at(0.5)
    assert all(torch.equal(folded.weights[n], source.candidates[0][n]) for n in targets)
    assert all(torch.equal(folded.masks[n], result.masks[n]) for n in targets)
    assert not any("loss" in name for name in folded.stats)
    wanted = compensate(small_units().values(), targets, result.masks, source.layer_inputs(), 1e-3)
    for name in CONSUMERS:
        torch.testing.assert_close(source.candidates[1][name], wanted[name].float())
    bn = targets["bn.weight"] * result.masks["bn.weight"]
    assert torch.equal(source.candidates[1]["bn.weight"], bn), "a fitted reader sees what is not scaled"
    assert not torch.equal(source.candidates[0]["bn.weight"], bn)


def test_groups_with_a_reader_of_unknown_inputs_keep_their_gates() -> None:
    source = Source(2.0, 1.0, readers=[name for name in CONSUMERS if name != "side.weight"])
    targets = small_targets()
    CAPUnits().path(targets, source).at(0.75)
    folded, fitted = source.candidates
    for name in ("bn.weight", "bn.bias", "side.weight"):
        assert torch.equal(folded[name], fitted[name])
    assert not torch.equal(folded["fc2.weight"], fitted["fc2.weight"])


def test_single_zeros_of_another_pruner_stay() -> None:
    targets = small_targets()
    masks = random_masks(targets, 0.3)
    for losses in ((1.0, 2.0), (2.0, 1.0)):
        result = CAPUnits().path(targets, Source(*losses), masks).at(0.4)
        for name, mask in masks.items():
            assert not result.masks[name][~mask].any()
            assert not result.weights[name][~mask].any()


def test_on_a_model_losses_are_those_of_its_samples() -> None:
    model, batches = small_net(), images(40)
    targets = small_units().targets(model)
    pruner = CAPUnits(num_gradients=40, num_inputs=40)
    statistic = pruner.statistic
    assert statistic == UnitSamples(40, 1, 40)
    source = statistic.collector(model, targets, cross_entropy, batches)
    before = targets.copies()
    with pruner.path(targets, source) as path:
        result = path.at(0.3)
    assert all(torch.equal(before[name], weight) for name, weight in targets.items())
    result.apply(targets)
    with torch.no_grad():
        loss = sum(float(cross_entropy(model, batch)) for batch in batches) / len(batches)
    kind = "fitted" if result.stats["compensated"] else "folded"
    assert loss == pytest.approx(result.stats[f"loss_{kind}"], rel=1e-5)
    assert result.stats[f"loss_{kind}"] == min(result.stats["loss_folded"], result.stats["loss_fitted"])


def test_batches_that_can_be_read_once_are_refused_unless_there_is_no_fit() -> None:
    model = small_net()
    targets: Targets = small_units().targets(model)
    for pruner in (CAPUnits(num_gradients=16), CAPUnits(num_gradients=16, compensate=False)):
        source = pruner.statistic.collector(model, targets, cross_entropy, iter(images(16)))
        if pruner.compensate:
            with pytest.raises(GradientError, match="compensate=False"):
                pruner.path(targets, source)
        else:
            assert pruner.path(targets, source).at(0.5).sparsity >= 0.5


def test_best() -> None:
    assert best({"a": 2.0, "b": 1.0, "c": 1.0}) == "b"
    assert best({"a": float("nan"), "b": float("inf"), "c": 5.0}) == "c"
    assert best({"a": float("nan"), "b": float("nan")}) == "a"
