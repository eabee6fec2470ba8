from __future__ import annotations

import pytest
import torch

from lightning_cap.pruners import Magnitude, MagnitudeUnits
from lightning_cap.sparsity import Flops, Units
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.records import Saving
from lightning_cap.trainer.saving import goal_name, saving
from tests.support.toy import FEATURES, Toy


def test_what_goals_count_has_a_name() -> None:
    assert [goal_name(p) for p in (Magnitude(), MagnitudeUnits(), MagnitudeUnits(cost=Flops()))] == [
        "sparsity", "parameters", "flops",
    ]  # fmt: skip


def test_what_masks_save_is_told_of_units_alone() -> None:
    net = Toy(scheduler=False).net.eval()
    units = Units.from_model(net, torch.randn(2, FEATURES))
    targets, pruner = units.targets(net), MagnitudeUnits(cost=Flops())
    kept = {name: torch.arange(size) < size // 2 for name, size in units.sizes.items()}
    masks = units.masks(targets.shapes, kept)
    prices = pruner.prices(targets)
    price = prices.of({name: size // 2 for name, size in units.sizes.items()})
    found = saving(pruner, targets, masks)
    assert found == Saving("flops", 1 - price / prices.total, price, "FLOPs")
    assert saving(Magnitude(), targets, masks) is None  # of weights, among those of units
    assert saving(Magnitude(), Targets.from_model(net), {}) is None


def test_prices_are_shown_in_short() -> None:
    saved = Saving("flops", 0.75, 1.25e6, "FLOPs")
    assert (saved.left, saved.whole) == ("1.25 M FLOPs", "5 M FLOPs")
    assert Saving("latency", 0.5, 3.21, "ms").whole == "6.42 ms"
    assert Saving("flops", 0.0, 999.0, "FLOPs").left == "999 FLOPs"
    assert Saving("parameters", 0.25, 3e9, "weights").whole == pytest.approx("4 G weights")
