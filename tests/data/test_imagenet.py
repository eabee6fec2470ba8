from __future__ import annotations

import inspect
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_cap.data import ImageNetDataModule
from lightning_cap.errors import ConfigError, DataError
from tests.support.images import PER_CLASS, SIDE, break_image, image_data, small_images, write_tar


def test_folder_and_tar_give_every_image_once(root: Path) -> None:
    data = image_data(root, batch_size=5)
    data.setup("fit")
    assert data.num_classes == 3
    assert data.bad_images == 0
    batches = list(data.val_dataloader())
    assert [tuple(images.shape) for images, _ in batches] == [
        (5, 3, SIDE, SIDE),
        (5, 3, SIDE, SIDE),
        (2, 3, SIDE, SIDE),
    ]
    assert torch.cat([targets for _, targets in batches]).tolist() == sorted([0, 1, 2] * PER_CLASS)
    train = data.train_dataloader()
    assert [len(targets) for _, targets in train] == [5, 5]
    assert train.generator is None
    assert not train.persistent_workers
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        assert sum(len(targets) for _, targets in loader) == 12


def test_same_seeds_give_the_same_sample(root: Path) -> None:
    dataset = image_data(root, recipe="deit").training_set(augment=True)

    def draw(seed: int) -> torch.Tensor:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return dataset[3][0]

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_splits_by_path(tmp_path: Path) -> None:
    write_tar(tmp_path / "a" / "images.tar", small_images())
    data = image_data(tmp_path, train_split="a/images.tar", val_split=str(tmp_path / "a" / "images.tar"))
    data.setup("fit")
    assert len(data.training_set(True)) == len(data.validation_set()) == 12


def test_wrong_number_of_classes(root: Path) -> None:
    with pytest.raises(DataError, match=r"num_classes=10, but val_split='validation' has 3 classes"):
        image_data(root, num_classes=10).setup("validate")


def test_error_is_raised_in_trainer_before_any_step(root: Path) -> None:
    class Model(LightningModule):
        steps = 0

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.steps += 1

        def configure_optimizers(self) -> None:
            return None

    break_image(root, "cat/0.jpg")
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    model = Model()
    with pytest.raises(DataError, match=r"cat/0.jpg"):
        trainer.fit(model, datamodule=image_data(root))
    assert model.steps == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "diet"}, "did you mean 'deit'"),
        ({"crop": "rcc"}, "crop='rcc'"),
        ({"on_bad_image": "ignore"}, "on_bad_image='ignore'"),
        ({"interpolation": "cubic"}, "interpolation='cubic'"),
        ({"rand_augment": "augment9"}, "rand_augment='augment9'"),
        ({"rand_augment": "rand-q9"}, "rand_augment='rand-q9'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"img_size": 0}, "img_size=0"),
        ({"mixup": -0.1}, "mixup=-0.1"),
        ({"erasing_prob": 1.5}, "erasing_prob=1.5"),
        ({"test_crop_ratio": 0.0}, "test_crop_ratio=0.0"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        image_data(tmp_path, **options)


def test_every_argument_is_documented() -> None:
    text = inspect.getdoc(ImageNetDataModule) or ""
    for name in inspect.signature(ImageNetDataModule).parameters:
        assert f"\n    {name}: " in text
