"""scikit-learn's 1,797 real handwritten digits: a data set that needs no download."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lightning_cap.data.base import ClassificationDataModule
from lightning_cap.utilities.arguments import require_real, require_whole

_MEAN, _STD = 4.884, 6.017  # of all pixels, whose values are 0 to 16
_IMAGES = 1797
_SPLIT_SEED = 0


class DigitsDataModule(ClassificationDataModule):
    """The digits embedded in scikit-learn, 8 x 8 pixels, ten classes, on a fixed stratified split.

    Batches are (images (batch_size, 1, 8, 8) of about zero mean and unit variance, class indices (batch_size,)).

    Args:
        batch_size: images per step and process.
        val_fraction: share of the 1,797 images held out, the same ones whatever the seed.
        noise: standard deviation of the Gaussian pixel noise in training, in units of the normalised image.
        max_shift: largest random shift in training, in pixels, in each direction; 0 for none.
        num_workers: worker processes a loader; reading is so quick that they only cost.
        pin_memory: page-locked batches; None: when CUDA is available.
        seed: of the shuffling across processes and of the calibration loader.
        calibration_augmentation: whether `calibration_dataloader` augments as in training.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        batch_size: int = 128,
        val_fraction: float = 0.2,
        noise: float = 0.6,
        max_shift: int = 0,
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int = 0,
        calibration_augmentation: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, seed, calibration_augmentation)
        require_real(
            "val_fraction", val_fraction, "[0.01, 0.99]", example=0.2
        )  # at least one digit of each class in both
        require_real("noise", noise, "[0, inf)", example=0.6)
        require_whole("max_shift", max_shift, 0, 7)
        self.val_fraction = val_fraction
        self.noise = noise
        self.max_shift = max_shift

    @property
    def num_classes(self) -> int:
        """Ten."""
        return 10

    @property
    def known_classes(self) -> int:
        """Ten."""
        return self.num_classes

    @property
    def known_images(self) -> int:
        """All that are not held out."""
        return _IMAGES - math.ceil(self.val_fraction * _IMAGES)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of an image in a batch: (1, 8, 8)."""
        return 1, 8, 8

    def training_set(self, augment: bool) -> Dataset[Any]:
        """Return the training digits, with noise and shift or plain."""
        images, labels, _, _ = _split(self.val_fraction)
        return Digits(images, labels, self.noise, self.max_shift) if augment else Digits(images, labels)

    def validation_set(self) -> Dataset[Any]:
        """Return the held-out digits."""
        _, _, images, labels = _split(self.val_fraction)
        return Digits(images, labels)


class Digits(Dataset[tuple[Tensor, int]]):
    """Digits in memory, augmented one at a time from torch's global generator.

    Args:
        images: (n, 1, 8, 8), normalised.
        labels: class indices (n,).
        noise: standard deviation of the pixel noise, 0 for none.
        max_shift: largest shift in pixels, 0 for none; what comes into view is background.
    """

    def __init__(self, images: Tensor, labels: Tensor, noise: float = 0.0, max_shift: int = 0) -> None:
        self.images = images
        self.labels: list[int] = labels.tolist()
        self.noise = noise
        self.max_shift = max_shift
        self._background = -_MEAN / _STD

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return (image (1, 8, 8), class index)."""
        image = self.images[index]
        if self.max_shift:
            image = self._shift(image)
        if self.noise:
            image = torch.randn(image.shape).mul_(self.noise).add_(image)
        return image, self.labels[index]

    def _shift(self, image: Tensor) -> Tensor:
        reach = self.max_shift
        down, right = torch.randint(2 * reach + 1, (2,)).tolist()
        padded = F.pad(image, (reach,) * 4, value=self._background)
        return padded[:, down : down + image.shape[1], right : right + image.shape[2]]


@functools.lru_cache(maxsize=4)
def _split(val_fraction: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, then validation images and labels; stratified and always the same."""
    digits = load_digits()
    train, val = train_test_split(
        torch.arange(len(digits.target)).numpy(),
        test_size=val_fraction,
        stratify=digits.target,
        random_state=_SPLIT_SEED,
    )
    images = (torch.from_numpy(digits.images).float().unsqueeze(1) - _MEAN) / _STD
    labels = torch.from_numpy(digits.target).long()
    return images[train], labels[train], images[val], labels[val]
