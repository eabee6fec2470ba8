"""A callback state that is damaged or of another version is one error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_cap.errors import ConfigError, DataError
from tests.support.toy import TARGET, Toy, callback, loaders, trainer


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


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_one_error(tmp_path: Path, checkpoint: Path, name: str) -> None:
    saved = copy.deepcopy(torch.load(checkpoint, weights_only=True))
    key = next(key for key in saved["callbacks"] if "CAPPruning" in key)
    DAMAGES[name](saved["callbacks"][key])
    torch.save(saved, tmp_path / "damaged.ckpt")
    module = Toy()
    with pytest.raises(DataError, match=r"^ckpt_path: the state of CAPPruningCallback .* start anew") as caught:
        trainer(tmp_path, callback({0: 0.5}, dirpath=str(tmp_path / "out")), max_epochs=2).fit(
            module, **loaders(), ckpt_path=str(tmp_path / "damaged.ckpt")
        )
    assert "\n" not in str(caught.value)
    assert module.batches == []


def test_masks_of_other_targets_are_told_from_damaged_ones(tmp_path: Path, checkpoint: Path) -> None:
    cb = callback({0: 0.5}, include=["net.0.weight"], dirpath=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="its masks do not fit the targets"):
        trainer(tmp_path, cb, max_epochs=2).fit(Toy(), **loaders(), ckpt_path=str(checkpoint))
