from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_cap import VisionClassifier
from lightning_cap.data import DigitsDataModule, ImageNetDataModule
from lightning_cap.errors import ConfigError
from lightning_cap.planning.random_data import random_data
from tests.support.planned import small_model


def test_noise_is_as_large_as_the_data() -> None:
    data, known = random_data(small_model(), DigitsDataModule(batch_size=32), processes=2)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, 1, 8, 8)
    assert int(labels.max()) < 10
    real = DigitsDataModule()
    assert (known, data.images) == (True, len(real.training_set(augment=False)) // 2)  # type: ignore[arg-type]
    assert type(data).__name__ == "DigitsDataModule"  # as messages name it


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.33, 0.5, 0.99])
def test_digits_that_are_held_out_are_known(fraction: float) -> None:
    data = DigitsDataModule(val_fraction=fraction)
    assert data.known_images == len(data.training_set(augment=False))  # type: ignore[arg-type]


def test_no_file_is_opened() -> None:
    model = VisionClassifier("vit_tiny_patch16_224", num_classes=1000, model_kwargs={"depth": 1})
    data, known = random_data(model, ImageNetDataModule(root="/nowhere", img_size=96, batch_size=4), processes=8)
    assert (known, data.images, data.shape, data.num_classes) == (False, 1281167 // 8, (3, 96, 96), None)
    assert random_data(model, ImageNetDataModule(num_classes=5), 1)[0].num_classes == 5
    assert random_data(model, None, 1)[0].shape == (3, 224, 224)
    assert random_data(model, ImageNetDataModule(batch_size=4), 2, train_images=100)[0].images == 50


def test_what_tells_no_shape_is_refused() -> None:
    model = VisionClassifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), num_classes=3)
    with pytest.raises(ConfigError, match="nothing tells the shape of its inputs"):
        random_data(model, None, 1)
    model.example_input_array = torch.zeros(2, 3, 2, 2)
    assert random_data(model, None, 1)[0].shape == (3, 2, 2)
    with pytest.raises(ConfigError, match="batch_size=32 leaves no complete training batch of 40 images on 2"):
        random_data(model, None, 2, train_images=40)
