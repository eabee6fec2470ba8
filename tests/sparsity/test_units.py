"""Units made by hand on a small network: what is masked, what is kept, and what it costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_cap.errors import ConfigError, DataError, TargetError
from lightning_cap.sparsity import Flops, MaskSet, Parameters, UnitGroup, Units
from lightning_cap.sparsity.units import Layer, Slice, Width


def _lines(size: int) -> torch.Tensor:
    return torch.arange(size).unsqueeze(1)


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


def _units() -> Units:
    def group(first: str, second: str, size: int) -> UnitGroup:
        producers = (Slice(f"{first}.weight", 0, _lines(size)), Slice(f"{first}.bias", 0, _lines(size)))
        return UnitGroup(first, "neuron", size, producers, (), (Slice(f"{second}.weight", 1, _lines(size)),))

    layers = (
        Layer("0", 24, (Width(4, {"0": 1}),)),
        Layer("2", 40, (Width(4, {"0": 1}), Width(5, {"2": 1}))),
        Layer("4", 20, (Width(5, {"2": 1}),)),
    )
    return Units([group("0", "2", 4), group("2", "4", 5)], layers, 90)


def _kept(*pruned: tuple[str, int]) -> dict[str, torch.Tensor]:
    kept = {"0": torch.ones(4, dtype=torch.bool), "2": torch.ones(5, dtype=torch.bool)}
    for name, unit in pruned:
        kept[name][unit] = False
    return kept


def test_masks_and_kept_units_are_each_others_inverse() -> None:
    targets, units = _units().targets(model := _model()), _units()
    kept = _kept(("0", 1), ("0", 3), ("2", 0))
    masks = units.masks(targets.shapes, kept)
    assert set(masks) == {"0.weight", "0.bias", "2.weight", "2.bias", "4.weight"}
    assert not masks["0.weight"][[1, 3]].any()
    assert masks["0.weight"][[0, 2]].all()
    assert torch.equal(masks["2.weight"], torch.outer(kept["2"], kept["0"]))
    assert all(torch.equal(units.kept(masks)[name], kept[name]) for name in kept)
    with torch.no_grad():
        masked = model(torch.randn(6, 3))
        mask_set = MaskSet(targets)
        mask_set.update(masks)
        mask_set.apply_to_weights()
    assert masked.shape == (6, 2)
    fresh = MaskSet(targets)
    model[0].bias.data[0] = 0  # one weight that is zero is no pruned unit
    fresh.mask_zeros()
    assert all(torch.equal(fresh[name], masks[name]) for name in masks)


def test_a_unit_that_is_masked_in_part_is_refused() -> None:
    units = _units()
    masks = units.masks(units.targets(_model()).shapes, _kept(("0", 1)))
    masks["0.bias"][1] = True
    with pytest.raises(ConfigError, match="1 units of '0', first 1, are masked in part"):
        units.kept(masks)


def test_state_gives_the_same_units() -> None:
    units = _units()
    again = Units.from_state(units.state_dict())
    assert repr(again) == repr(units) == "Units(9 neurons in 2 groups)"
    assert again.layers == units.layers
    assert again.flops == 90
    for damaged in (None, {}, {**units.state_dict(), "groups": [{"name": "0"}]}):
        with pytest.raises(DataError, match="damaged"):
            Units.from_state(damaged)


def test_another_model_is_refused() -> None:
    with pytest.raises(TargetError, match=r"units of '2' have entries of '4.weight', which has shape \(2, 3\) here"):
        _units().targets(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(3, 2)))


def test_layers_without_units_are_dense() -> None:
    one = Units([_units()["0"]], (), 90, {"2": "attention", "4": "output"})
    targets = one.targets(_model())
    assert targets.dense == {"4.weight": "output"}  # columns of 2.weight are pruned with the units of 0


def test_parameters_count_zeros() -> None:
    targets = _units().targets(_model())
    prices = Parameters().unit_prices(_units(), targets.shapes)
    assert prices.total == targets.numel == 51
    kept = _kept(("0", 1), ("0", 3), ("2", 0))
    masks = _units().masks(targets.shapes, kept)
    counts = {name: int(units.sum()) for name, units in kept.items()}
    assert prices.of(counts) == sum(int(mask.sum()) for mask in masks.values())
    more = _units().masks(targets.shapes, _kept(("0", 1), ("0", 3), ("2", 0), ("2", 4)))
    assert prices.saving(counts, "2") == prices.of(counts) - sum(int(mask.sum()) for mask in more.values())


def test_flops_are_those_of_the_smaller_model() -> None:
    prices = Flops().unit_prices(_units(), {})
    assert prices.total == 90
    counts = {"0": 2, "2": 4}
    assert prices.of(counts) == 6 + 2 * (3 * 2 + 2 * 4 + 4 * 2)
    assert prices.saving(counts, "0") == prices.of(counts) - prices.of({"0": 1, "2": 4})
    assert prices.neighbours("0") == {"0", "2"}
    assert prices.least() == 6 + 2 * (3 + 1 + 2)
    assert prices.saved_share(counts) == pytest.approx(1 - prices.of(counts) / 90)
