"""Random data in place of that of a run, which need not be there."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_cap.classifier.agreement import input_shape
from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import is_whole, require_counts
from lightning_cap.utilities.compiled import plain_module

_IMAGENET_CLASSES, _IMAGENET_IMAGES = 1000, 1_281_167
_ASSUMED_IMAGES = 10_000
_ASSUMED_CLASSES = 2
_DIFFERENT = 8  # images, which come again and again
_BATCH_SIZE = 32  # where the data does not tell its own


class RandomData(pl.LightningDataModule):
    """Batches ``(images, labels)`` of noise, as large as those of a run.

    Args:
        shape: Of an image.
        classes: Labels are below it.
        batch_size: Of a process.
        images: For training, of a process.

    Attributes:
        image_shape: As the data tells it, for the model to compare; None if it does not.
        num_classes: Likewise.
        normalization: Likewise.
        tried: Samples of a batch that is only to be tried; None for as many as in others.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, batch_size: int, images: int) -> None:
        super().__init__()
        self.shape, self.classes, self.batch_size, self.images = shape, classes, batch_size, images
        self.image_shape: tuple[int, ...] | None = None
        self.num_classes: int | None = None
        self.normalization: Any = None
        self.tried: int | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, without the incomplete last batch."""
        return DataLoader(_Noise(self.shape, self.classes, self.images), self.batch_size, shuffle=True, drop_last=True)

    def calibration_dataloader(self) -> DataLoader[Any]:
        """As for training, in batches that are tried."""
        batch = self.batch_size if self.tried is None else min(self.batch_size, self.tried)
        return DataLoader(_Noise(self.shape, self.classes, self.images), batch, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """One batch."""
        return DataLoader(_Noise(self.shape, self.classes, self.batch_size), self.batch_size)


class _Noise(Dataset[tuple[Tensor, int]]):
    def __init__(self, shape: tuple[int, ...], classes: int, images: int) -> None:
        self._images = torch.randn(_DIFFERENT, *shape, generator=torch.Generator().manual_seed(0))
        self._classes, self._count = classes, images

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index % _DIFFERENT], index % self._classes


def random_data(
    module: pl.LightningModule, data: pl.LightningDataModule | None, processes: int, train_images: int | None = None
) -> tuple[RandomData, bool]:
    """Noise like the data of a run, by what model and data module tell without it.

    Args:
        module: Of the run.
        data: Its data module; not asked for anything that would open files. None for none.
        processes: That share the training images.
        train_images: How many there are in all. Default: as the data module tells by ``known_images``, else as many as in
            ImageNet-1k for 1000 classes, else 10,000.

    Returns:
        The data module, and whether the number of images is known.

    Raises:
        ConfigError: Nothing tells the size of the images, or a process would have no batch.
    """
    if train_images is not None:
        require_counts(train_images=train_images)
    told = _told(data, "image_shape")
    shape = told if isinstance(told, tuple) else _shape_of(module)
    if shape is None:
        raise ConfigError(
            f"model={type(module).__name__}: nothing tells the shape of its inputs. Give the data module an image_shape, such as "
            "(3, 224, 224), or the LightningModule an example_input_array."
        )
    own, of_data = getattr(module, "num_classes", None), _told(data, "known_classes")
    classes = int(next((c for c in (own, of_data) if isinstance(c, int)), _ASSUMED_CLASSES))
    known = train_images if train_images is not None else _told(data, "known_images")
    images = known if known is not None else _IMAGENET_IMAGES if classes == _IMAGENET_CLASSES else _ASSUMED_IMAGES
    batch = _told(data, "batch_size")
    batch = int(batch) if is_whole(batch) else _BATCH_SIZE
    if images // processes < batch:
        raise ConfigError(
            f"batch_size={batch} leaves no complete training batch of {images} images on {processes} process(es): use a "
            "smaller one."
        )
    kind: type[RandomData] = (
        type(type(data).__name__, (RandomData,), {}) if data is not None else RandomData
    )  # for messages
    found = kind(tuple(shape), classes, batch, images // processes)
    found.image_shape, found.num_classes = told if isinstance(told, tuple) else None, of_data
    return found, known is not None


def _told(data: pl.LightningDataModule | None, name: str) -> Any:
    return getattr(data, name, None)


def _shape_of(module: pl.LightningModule) -> tuple[int, ...] | None:
    """Of one input of a module: as its model tells it, else as its example has it."""
    parts: list[nn.Module] = [module, *module.children()]
    for part in parts:
        found = input_shape(plain_module(part))
        if found is not None:
            return found
    example = module.example_input_array
    example = example[0] if isinstance(example, (tuple, list)) and example else example
    return tuple(example.shape[1:]) if isinstance(example, Tensor) and example.dim() > 1 else None
