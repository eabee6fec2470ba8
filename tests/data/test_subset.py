"""A validation split that has a subset of the training classes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from lightning_cap import VisionClassifier
from lightning_cap.data import reading
from lightning_cap.data.reading import reader_classes
from lightning_cap.errors import DataError
from tests.support.classifying import trainer, vit
from tests.support.images import image_data, small_images, write_folder, write_tar

TRAINING = {"cat": 0, "dog": 1, "emu": 2}
SOME = ("dog", "emu")


def write(root: Path, kind: str, split: str, classes: tuple[str, ...]) -> None:
    if kind == "folder":
        write_folder(root / split, small_images(classes, each=4))
    else:
        write_tar(root / f"{split}.tar", small_images(classes, each=4))


@pytest.fixture(params=["folder", "tar"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_indices_are_those_of_training(tmp_path: Path, kind: str, stage: str, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, kind, "train", tuple(TRAINING))
    write(tmp_path, kind, "val", SOME)
    data = image_data(tmp_path)
    with caplog.at_level(logging.INFO):
        data.setup(stage)
        data.setup("validate")
    labels = [int(label) for batch in data.val_dataloader() for label in batch[1]]
    assert sorted(labels) == [1] * 4 + [2] * 4
    assert data.num_classes == 3
    told = [record.getMessage() for record in caplog.records if "val_split" in record.getMessage()]
    assert told == ["val_split='validation' has 2 of the 3 training classes; class indices are those of training."]


def test_without_training_the_split_has_its_own_classes(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind, "val", SOME)
    data = image_data(tmp_path)
    data.setup("validate")
    assert data.num_classes == 2
    with pytest.raises(DataError, match="split 'train' is missing"):
        data.setup("fit")


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_classes_that_training_lacks_are_refused(tmp_path: Path, kind: str, stage: str) -> None:
    write(tmp_path, kind, "train", tuple(TRAINING))
    write(tmp_path, kind, "val", ("dog", "fox", "gnu"))
    with pytest.raises(
        DataError, match=r"only in training cat, emu; only in validation fox, gnu. Validation may lack classes"
    ):
        image_data(tmp_path).setup(stage)


def test_a_training_tree_of_the_same_classes_is_not_read_for_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "folder", "train", tuple(TRAINING))
    write(tmp_path, "tar", "val", tuple(TRAINING))
    walked: list[Path] = []
    monkeypatch.setattr(reading, "check_folder", walked.append)
    data = image_data(tmp_path)
    data.setup("validate")
    assert walked == []
    assert data.num_classes == 3


def test_the_number_of_classes_is_that_of_training(tmp_path: Path) -> None:
    write(tmp_path, "folder", "train", tuple(TRAINING))
    write(tmp_path, "folder", "val", SOME)
    image_data(tmp_path, num_classes=3).setup("fit")
    image_data(tmp_path, num_classes=3).setup("validate")
    with pytest.raises(DataError, match="num_classes=2, but val_split='validation' has 3 classes"):
        image_data(tmp_path, num_classes=2).setup("validate")


def test_a_model_of_all_classes_trains_and_is_tested(tmp_path: Path) -> None:
    write(tmp_path, "folder", "train", tuple(TRAINING))
    write(tmp_path, "folder", "val", SOME)
    options: dict[str, Any] = {"img_size": 16, "batch_size": 4, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    module = VisionClassifier(vit(img_size=16, in_chans=3, num_classes=3))
    run = trainer(tmp_path, max_epochs=1)
    data = image_data(tmp_path, **options)
    run.fit(module, data)
    [metrics] = run.test(module, data, verbose=False)
    assert 0 <= metrics["test/acc"] <= 1
    assert reader_classes(data.validation_set().reader) == TRAINING  # type: ignore[attr-defined]
