"""A run that is resumed with other settings says so at its start."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_cap.callbacks.settings import describe_settings
from lightning_cap.pruners import CAP, Magnitude, Pruner
from tests.support.stopping import CrashError, StopAfter
from tests.support.toy import Toy, callback, cap, loaders, trainer


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """Of a run that was to prune at epochs 0 and 3, after its first cycle began; saved at the end of epoch 1."""
    cb = callback({0: 0.5, 2: 0.75}, dirpath=str(tmp_path / "out"))
    trainer(tmp_path, cb, max_epochs=2 + 1).fit(Toy(), **loaders())
    return str(tmp_path / "out/sparsity=0.50.ckpt")


def resumed(folder: Path, checkpoint: str, schedule: dict[int, float], **settings: Any) -> tuple[Any, list[str]]:
    cb = callback(schedule, dirpath=str(folder / "out"), **settings)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(folder, cb, max_epochs=4).fit(Toy(), **loaders(), ckpt_path=checkpoint)
    texts = [str(entry.message) for entry in told]
    return cb, [
        text for text in texts if "checkpoint's" in text or "pruning events of epochs" in text or "already" in text
    ]


def test_the_same_settings_are_no_news(tmp_path: Path, checkpoint: str) -> None:
    assert resumed(tmp_path, checkpoint, {0: 0.5, 2: 0.75})[1] == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pruner": cap(damp=1e-3)}, "pruner.damp 0.0001 -> 0.001."),
        ({"pruner": Magnitude()}, "pruner CAP -> Magnitude"),
        ({"num_recomputations": 2}, "num_recomputations 1 -> 2."),
        ({"seed": 5}, "seed 0 -> 5."),
    ],
    ids=str,
)
def test_what_differs_is_said_at_the_start(
    tmp_path: Path, checkpoint: str, settings: dict[str, Any], words: str
) -> None:
    cb, (text,) = resumed(tmp_path, checkpoint, {0: 0.5, 2: 0.75}, **settings)
    assert words in text
    assert "Events of epochs [2] are to come, with the settings of this run. Those of epochs [0] are done" in text
    assert cb.masks.global_sparsity == 0.75


def test_another_schedule(tmp_path: Path, checkpoint: str) -> None:
    cb, (text,) = resumed(tmp_path, checkpoint, {0: 0.5, 1: 0.6, 3: 0.9})
    assert "schedule {0: 0.5, 2: 0.75} -> {0: 0.5, 1: 0.6, 3: 0.9}." in text
    assert "Events of epochs [3] are to come" in text
    assert "Those of epochs [1] are not run: training goes on after them." in text
    assert cb.masks.global_sparsity == pytest.approx(0.9, abs=1e-2)


def test_an_event_in_the_middle_of_whose_epoch_training_goes_on_is_past(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=6)
    cut = trainer(tmp_path, callback({0: 0.5, 3: 0.75}), saver, StopAfter(2), enable_checkpointing=True)
    with pytest.raises(CrashError):
        cut.fit(Toy(), **loaders())
    cb, (text,) = resumed(tmp_path, str(tmp_path / "step=6.ckpt"), {0: 0.5, 1: 0.6, 2: 0.7})
    assert "Those of epochs [1] are not run" in text
    assert cb._state.done == [0, 2]


def test_a_pruner_of_ones_own_is_described_by_its_class() -> None:
    class Mine(Magnitude):
        pass

    assert describe_settings({1: 0.5}, Mine(), seed=3)["pruner"].endswith("Mine")
    described = describe_settings({1: 0.5}, CAP(block_size=64))
    assert described["pruner.block_size"] == "64"
    assert all(" at 0x" not in value for value in described.values())
    assert isinstance(CAP(), Pruner)
