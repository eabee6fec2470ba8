from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_cap.data.augment import MixupCollate
from tests.support.images import SIDE, image_data, small_images


def test_padded_crop_shifts_by_at_most_the_padding(root: Path) -> None:
    options: dict[str, Any] = {"crop": "pad", "crop_padding": 2, "rand_augment": "none", "hflip": 0.0}
    data = image_data(root, test_crop_ratio=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), **options)
    plain = data.validation_set()[0][0]
    padded = torch.nn.functional.pad(plain, (2, 2, 2, 2))
    windows = [padded[:, i : i + SIDE, j : j + SIDE] for i in range(5) for j in range(5)]
    crops = [data.training_set(augment=True)[0][0] for _ in range(30)]
    assert all(any(torch.allclose(crop, window) for window in windows) for crop in crops)
    assert any(not torch.equal(crop, plain) for crop in crops)
    flipped = image_data(root, **(options | {"crop_padding": 0, "hflip": 1.0})).training_set(augment=True)[0][0]
    torch.testing.assert_close(flipped, image_data(root, test_crop_ratio=1.0).validation_set()[0][0].flip(2))


def test_random_resized_crop_and_erasing_follow_the_recipe(root: Path) -> None:
    def steps(**settings: Any) -> list[str]:
        transform = image_data(root, **settings).training_set(True).transform
        return [type(step).__name__.removeprefix("Maybe") for step in transform.transforms]  # MaybeToTensor: a new timm

    expected = ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment", "ToTensor", "Normalize"]
    assert steps(recipe="deit") == [*expected, "RandomErasing"]
    assert steps(rand_augment="none") == [name for name in expected if name != "RandAugment"]


def test_every_magnitude_of_randaugment_works(root: Path) -> None:
    data = image_data(root, rand_augment="rand-m10-n15-p1.0-inc1")  # the largest: posterize would keep no bit
    dataset = data.training_set(augment=True)
    assert all(dataset[index % 12][0].isfinite().all() for index in range(48))


def test_evaluation_is_resize_crop_and_normalisation(root: Path) -> None:
    data = image_data(root, test_crop_ratio=1.0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    image, target = data.validation_set()[5]
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(small_images()["dog/1.jpg"])))).permute(2, 0, 1) / 255
    torch.testing.assert_close(image, (pixels - 0.5) / 0.25)
    assert target == 1


def test_mixup_makes_soft_targets_with_smoothing(root: Path) -> None:
    data = image_data(root, recipe="deit", label_smoothing=0.3)
    _, targets = next(iter(data.train_dataloader()))
    assert targets.shape == (4, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert targets.min() >= 0.3 / 3 - 1e-6
    assert next(iter(data.val_dataloader()))[1].dtype == torch.int64
    assert next(iter(image_data(root).train_dataloader()))[1].dtype == torch.int64


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixup_of_any_batch_size_pairs_each_sample_with_its_mirror(size: int, mixup: float, cutmix: float) -> None:
    collate = pickle.loads(pickle.dumps(MixupCollate(mixup, cutmix, 0.0, size)))
    samples = [(torch.full((3, 8, 8), float(index)), index) for index in range(size)]
    np.random.seed(0)
    images, targets = collate(samples)
    assert images.shape == (size, 3, 8, 8)
    mean = images.mean(dim=(1, 2, 3))  # of constant images: the mixing shares, for cutmix those of the areas
    torch.testing.assert_close(mean, targets @ torch.arange(float(size)), atol=1e-5, rtol=0)
    for index, row in enumerate(targets):
        assert set(row.nonzero().flatten().tolist()) <= {index, size - 1 - index}
