"""What is wrong with a checkpoint is in `tests/support/bad_input/checkpoints.py`; here is what is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_cap.errors import DataError
from lightning_cap.trainer.checkpoints import WORDS, check_checkpoint, naming_mismatch
from tests.support.checkpoints import checkpoint
from tests.support.comparing import Data
from tests.support.toy import Toy, trainer


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}])
def test_sound_checkpoints_are_taken(tmp_path: Path, how: dict[str, Any]) -> None:
    path = tmp_path / "a.ckpt"
    torch.save(checkpoint(), path, **how)
    check_checkpoint(path, resumes=True)
    check_checkpoint(str(path))


@pytest.mark.parametrize("version", ["1.0", "2.5.0.post0", "2.6.0rc1", "2.6.0.dev20260101", "2.5.1+local.3"])
def test_every_version_of_lightning_is_known(tmp_path: Path, version: str) -> None:
    torch.save(checkpoint(**{"pytorch-lightning_version": version}), tmp_path / "a.ckpt")
    check_checkpoint(tmp_path / "a.ckpt")


def test_what_lightning_looks_up_is_left_to_it() -> None:
    for path in (None, *WORDS, "s3://bucket/a.ckpt", "registry", "Registry:a/model:version:1"):
        check_checkpoint(path)


def test_a_home_folder_may_be_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(checkpoint(), tmp_path / "a.ckpt")
    check_checkpoint("~/a.ckpt")


def test_those_of_a_trainer_are_taken(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=1)
    run.fit(Toy(), datamodule=Data())
    run.save_checkpoint(tmp_path / "whole.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    check_checkpoint(tmp_path / "whole.ckpt", resumes=True)
    check_checkpoint(tmp_path / "weights.ckpt")
    with pytest.raises(DataError, match=r"weights\.ckpt.* no optimizer_states, as with save_weights_only=True"):
        check_checkpoint(tmp_path / "weights.ckpt", resumes=True)


def test_weights_of_another_model_are_named_in_one_line(tmp_path: Path) -> None:
    other = {f"net.0.weight{i}": torch.ones(1) for i in range(40)} | {"net.4.weight": torch.ones(2, 2)}
    torch.save(checkpoint(state_dict=other), tmp_path / "a.ckpt")
    with pytest.raises(DataError) as caught, naming_mismatch(tmp_path / "a.ckpt"):
        trainer(tmp_path).validate(Toy(), datamodule=Data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    message = str(caught.value)
    assert "ckpt_path=" in message
    assert "another model" in message
    assert '"net.0.weight"' in message
    assert "\n" not in message
    assert len(message) < 700
    with pytest.raises(RuntimeError, match="mine"), naming_mismatch("a.ckpt"):
        raise RuntimeError("mine")
