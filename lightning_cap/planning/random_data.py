"""Random data in place of that of a run, which need not be there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
_DIFFERENT = 8  # samples, which come again and again
_BATCH_SIZE = 32  # where the data does not tell its own


class RandomData(pl.LightningDataModule):
    """Batches ``(inputs, labels)`` as large as those of a run: of noise, or of the rows of an example, which come again and again.

    Args:
        example: Inputs ``(n, ...)``, or named ones. The batches of these are mappings, with ``labels`` besides where no name has
            "label" in it.
        classes: Labels are below it.
        batch_size: Of a process.
        images: Samples for training, of a process.

    Attributes:
        image_shape: As the data tells it, for the model to compare; None if it does not.
        num_classes: Likewise.
        normalization: Likewise.
        tried: Samples of a batch that is only to be tried; None for as many as in others.
    """

    def __init__(self, example: Tensor | Mapping[str, Tensor], classes: int, batch_size: int, images: int) -> None:
        super().__init__()
        self.example, self.classes, self.batch_size, self.images = example, classes, batch_size, images
        self.image_shape: tuple[int, ...] | None = None
        self.num_classes: int | None = None
        self.normalization: Any = None
        self.tried: int | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled, without the incomplete last batch."""
        return DataLoader(_Rows(self.example, self.classes, self.images), self.batch_size, shuffle=True, drop_last=True)

    def calibration_dataloader(self) -> DataLoader[Any]:
        """As for training, in batches that are tried."""
        batch = self.batch_size if self.tried is None else min(self.batch_size, self.tried)
        return DataLoader(_Rows(self.example, self.classes, self.images), batch, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """One batch."""
        return DataLoader(_Rows(self.example, self.classes, self.batch_size), self.batch_size)

    def one(self, batch: Any) -> Tensor | dict[str, Tensor]:
        """The inputs of one sample of a batch, as the model takes them."""
        return {name: batch[name][:1] for name in self.example} if isinstance(self.example, Mapping) else batch[0][:1]


class _Rows(Dataset[Any]):
    def __init__(self, example: Tensor | Mapping[str, Tensor], classes: int, count: int) -> None:
        self._example, self._classes, self._count = example, classes, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        label = index % self._classes
        if not isinstance(self._example, Mapping):
            return self._example[index % len(self._example)], label
        named = {name: values[index % len(values)] for name, values in self._example.items()}
        return named if any("label" in name for name in named) else {**named, "labels": label}


def random_data(
    module: pl.LightningModule, data: pl.LightningDataModule | None, processes: int, train_images: int | None = None
) -> tuple[RandomData, bool]:
    """Data like that of a run, by what model and data module tell without it.

    Noise of the shape that they tell; else, where the ``example_input_array`` is of integers, such as words by number, or a dict,
    the rows of that.

    Args:
        module: Of the run.
        data: Its data module; not asked for anything that would open files. None for none.
        processes: That share the training samples.
        train_images: How many there are in all. Default: as the data module tells by ``known_images``, else as many as in
            ImageNet-1k for 1000 classes, else 10,000.

    Returns:
        The data module, and whether the number of samples is known.

    Raises:
        ConfigError: Nothing tells the inputs, or a process would have no batch.
    """
    if train_images is not None:
        require_counts(train_images=train_images)
    told = _told(data, "image_shape")
    example = _noise(told) if isinstance(told, tuple) else _example_of(module)
    if example is None:
        raise ConfigError(
            f"model={type(module).__name__}: nothing tells the shape of its inputs. Give the data module an image_shape, such as "
            "(3, 224, 224), or the LightningModule an example_input_array: a tensor (n, ...), or a dict of those."
        )
    own, of_data = getattr(module, "num_classes", None), _told(data, "known_classes")
    classes = int(next((c for c in (own, of_data) if isinstance(c, int)), _ASSUMED_CLASSES))
    known = train_images if train_images is not None else _told(data, "known_images")
    images = known if known is not None else _IMAGENET_IMAGES if classes == _IMAGENET_CLASSES else _ASSUMED_IMAGES
    batch = _told(data, "batch_size")
    batch = int(batch) if is_whole(batch) else _BATCH_SIZE
    if images // processes < batch:
        raise ConfigError(
            f"batch_size={batch} leaves no complete training batch of {images} samples on {processes} process(es): use a "
            "smaller one."
        )
    kind: type[RandomData] = (
        type(type(data).__name__, (RandomData,), {}) if data is not None else RandomData
    )  # for messages
    found = kind(example, classes, batch, images // processes)
    found.image_shape, found.num_classes = told if isinstance(told, tuple) else None, of_data
    return found, known is not None


def _told(data: pl.LightningDataModule | None, name: str) -> Any:
    return getattr(data, name, None)


def _noise(shape: Iterable[int]) -> Tensor:
    return torch.randn(_DIFFERENT, *shape, generator=torch.Generator().manual_seed(0))


def _example_of(module: pl.LightningModule) -> Tensor | Mapping[str, Tensor] | None:
    """Inputs of a module: noise as its model tells it, else as its example is."""
    parts: list[nn.Module] = [module, *module.children()]
    for part in parts:
        found = input_shape(plain_module(part))
        if found is not None:
            return _noise(found)
    example: Any = module.example_input_array
    if isinstance(example, Mapping):
        rows = all(isinstance(value, Tensor) and value.dim() and len(value) for value in example.values())
        return {name: value.detach().cpu() for name, value in example.items()} if example and rows else None
    example = example[0] if isinstance(example, (tuple, list)) and example else example
    if not isinstance(example, Tensor) or example.dim() < 2:
        return None
    if example.is_floating_point():
        return _noise(example.shape[1:])
    return example.detach().cpu() if len(example) else None
