"""A callback state that is damaged or of another version is one error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_cap.errors import ConfigError, DataError
from tests.support.toy import TARGET, Toy, callback, loaders, trainer
from tests.support.unit_runs import units


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder, callback({0: 0.5}, dirpath=str(folder)), max_epochs=1).fit(Toy(), **loaders())
    return folder / "sparsity=0.50.ckpt"


DAMAGES: dict[str, Any] = {
    "no masks": lambda s: s.pop("masks"),
    "no version, as before": lambda s: s.pop("version"),
    "newer": lambda s: s.update(version=99),
    "masks are a list": lambda s: s.update(masks=[1]),
    "masks of one target are no masks": lambda s: s["masks"].update({TARGET: {"shape": [16, 16]}}),
    "masks have no shape": lambda s: s["masks"].update({TARGET: 3}),
    "masks are too short": lambda s: s["masks"][TARGET].update(bits=torch.zeros(3, dtype=torch.uint8)),
    "done is a number": lambda s: s.update(done=3),
    "the cycle has another field": lambda s: s["cycle"].update(x=1),
    "a line of the table is none": lambda s: s["history"].append({"goal": 1}),
    "the pruner's state is none": lambda s: s["pruner"].update(row_chunk="x"),
    "random states are none": lambda s: s.update(rng=None),
    "ends are a list": lambda s: s.update(ends=[]),
    "ends lack the last": lambda s: s["ends"].pop("last"),
    "the first are none": lambda s: s["ends"].update(first=3),
    "a random state is a number": lambda s: s.update(rng=[3]),
    "collections are fewer than none": lambda s: s.update(collection_index=-5),
    "an epoch is text": lambda s: s.update(done=["x"]),
    "the cycle's goal is text": lambda s: s["cycle"].update(goal="x"),
    "settings are none": lambda s: s.update(settings=[]),
}


DAMAGES_OF_UNITS: dict[str, Any] = {
    "units are a list": lambda s: s.update(units=[]),
    "units have no groups": lambda s: s["units"].pop("groups"),
    "a group has no size": lambda s: s["units"]["groups"][0].pop("size"),
    "an index is text": lambda s: s["units"]["groups"][0]["producers"][0].__setitem__(2, "x"),
    "a layer is a number": lambda s: s["units"].update(layers=[3]),
    "a saving lacks its price": lambda s: s["history"][0]["saving"].pop("price"),
}


def assert_refused(folder: Path, checkpoint: Path, cb: Any, damage: Any) -> None:
    saved = copy.deepcopy(torch.load(checkpoint, weights_only=True))
    key = next(key for key in saved["callbacks"] if "CAPPruning" in key)
    damage(saved["callbacks"][key])
    torch.save(saved, folder / "damaged.ckpt")
    module = Toy()
    with pytest.raises(DataError, match=r"^ckpt_path: the state of CAPPruningCallback .* start anew") as caught:
        trainer(folder, cb, max_epochs=2).fit(module, **loaders(), ckpt_path=str(folder / "damaged.ckpt"))
    assert "\n" not in str(caught.value)
    assert module.batches == []


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_one_error(tmp_path: Path, checkpoint: Path, name: str) -> None:
    assert_refused(tmp_path, checkpoint, callback({0: 0.5}, dirpath=str(tmp_path / "out")), DAMAGES[name])


@pytest.fixture(scope="module")
def checkpoint_of_units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("units")
    trainer(folder, units({0: 0.5}, dirpath=str(folder)), max_epochs=1).fit(Toy(), **loaders())
    return folder / "flops=0.50.ckpt"


@pytest.mark.parametrize("name", DAMAGES_OF_UNITS)
def test_damaged_units_are_one_error(tmp_path: Path, checkpoint_of_units: Path, name: str) -> None:
    cb = units({0: 0.5}, dirpath=str(tmp_path / "out"))
    assert_refused(tmp_path, checkpoint_of_units, cb, DAMAGES_OF_UNITS[name])


def test_a_state_of_the_version_before_is_read(tmp_path: Path, checkpoint: Path) -> None:
    """It knew no units, and no cycles of several callbacks."""
    saved = torch.load(checkpoint, weights_only=True)
    state = saved["callbacks"]["CAPPruningCallback"]
    before = copy.deepcopy(state)
    state["version"] = 2
    del state["units"], state["cycle"]["begun"]
    for line in state["history"]:
        line["version"] = 2
        del line["saving"]
    torch.save(saved, tmp_path / "old.ckpt")
    cb = callback({0: 0.5}, dirpath=str(tmp_path / "out"))
    trainer(tmp_path, cb, max_epochs=2).fit(Toy(), **loaders(), ckpt_path=str(tmp_path / "old.ckpt"))
    assert [record.to_json() for record in cb.history[:1]] == before["history"][:1]
    assert cb.history[1].epochs == 2


def test_masks_of_other_targets_are_told_from_damaged_ones(tmp_path: Path, checkpoint: Path) -> None:
    cb = callback({0: 0.5}, include=["net.0.weight"], dirpath=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="its masks do not fit the targets"):
        trainer(tmp_path, cb, max_epochs=2).fit(Toy(), **loaders(), ckpt_path=str(checkpoint))
