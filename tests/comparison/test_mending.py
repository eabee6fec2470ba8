"""Comparisons whose solutions are healed, and whose batch norms are estimated anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_cap.comparison import LossSurface
from lightning_cap.errors import ConfigError
from lightning_cap.pruners import CAPUnits, Magnitude
from tests.support.comparing import paths, run, toy

GM = {"GM": Magnitude()}


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_records_are_of_mended_models_and_the_module_is_as_before(tmp_path: Path) -> None:
    module = toy()
    before = state(module)
    found = [
        run(None, GM, [0.75], module=module, **kwargs)[1]
        for kwargs in ({}, {"heal": "layerwise"}, {"recalibrate": True})
    ]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert len({record.solution for record in found}) == 3
    assert len({record.metrics["val_loss"] for record in found}) == 3
    assert set(found[1].seconds) - set(found[0].seconds) == {"heal"}
    assert set(found[2].seconds) - set(found[0].seconds) == {"recalibrate"}
    assert found[2].parameters["recalibrate"] is True
    assert "LayerwiseHeal" in found[1].settings


def test_a_record_is_not_taken_for_one_that_was_mended_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = paths(monkeypatch)
    first = run(tmp_path, GM, [0.75])
    for kwargs in ({"heal": "layerwise"}, {"heal": "layerwise", "recalibrate": True}, {"recalibrate": True}):
        solved.clear()
        records = run(tmp_path, GM, [0.75], **kwargs)
        assert solved == ["GM/0"]
        assert run(tmp_path, GM, [0.75], **kwargs) == records
        assert solved == ["GM/0"]
        assert records[1].fingerprint != first[1].fingerprint


def test_what_is_measured_later_is_measured_of_the_mended_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend: dict[str, Any] = {"heal": "layerwise", "recalibrate": True}
    want = run(tmp_path / "at once", GM, [0.75], loss_samples=48, **mend)
    run(tmp_path / "later", GM, [0.75], loss_samples=16, **mend)
    solved = paths(monkeypatch)
    found = run(tmp_path / "later", GM, [0.75], loss_samples=48, save_weights=True, **mend)
    assert solved == []
    assert found[1].loss_increase == want[1].loss_increase
    written = load_file(tmp_path / "later" / found[1].weights)
    assert not torch.equal(written["4.bias"], toy().net[4].bias)


def test_a_heal_can_be_compared_with_none_in_steps_and_at_once() -> None:
    records = run(None, GM, [0.75], grids={"heal": ["layerwise"]}, num_recomputations=2, loss_samples=0)
    assert [record.label for record in records] == ["unpruned", "GM", "GM heal=layerwise"]
    assert records[1].solution != records[2].solution
    assert records[2].seconds["heal"] > 0


def test_a_surface_goes_through_healed_solutions(tmp_path: Path) -> None:
    pruners = {"GM": Magnitude(), "healed": Magnitude(heal="layerwise")}
    surface = LossSurface(("GM", "healed"), 0.75, points=2, margin=0.0)
    records = run(tmp_path, pruners, [0.75], surface=surface)
    drawn = (tmp_path / "surface.json").read_text()
    assert f'"healed": {records[2].metrics["val_loss"]!r}'[:20] in drawn


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pruners": {"units": CAPUnits()}, "heal": "layerwise"}, "pruner 'units': heal=.*prunes units"),
        ({"heal": "rows"}, "heal='rows': give 'layerwise'"),
        ({"recalibrate": "yes"}, "recalibrate='yes'"),
        (
            {
                "pruners": {"a": Magnitude(), "b": Magnitude()},
                "recalibrate": True,
                "surface": LossSurface(("a", "b"), 0.75),
            },
            "recalibrate=True: a surface",
        ),
    ],
    ids=["units", "heal", "recalibrate", "surface"],
)
def test_what_cannot_be_is_refused(tmp_path: Path, kwargs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, kwargs.pop("pruners", GM), [0.75], **kwargs)
