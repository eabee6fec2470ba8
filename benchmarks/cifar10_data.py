"""CIFAR-10 from the tars, with the augmentation that the benchmark's models were trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from lightning_cap.data import ImageNetDataModule

DRAW_BATCH = 64  # images decoded at a time


class PaddedAfterwards(Dataset[Any]):
    """Normalised images padded with zeros, cropped and flipped: the border has the mean colour instead of black."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._augment = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._dataset[index]
        return self._augment(image), label


def open_data(root: Path, batch_size: int = DRAW_BATCH) -> ImageNetDataModule:
    """CIFAR-10 with the augmentation that the models were trained with."""
    return ImageNetDataModule(
        root=str(root),
        recipe="light1",
        label_smoothing=0.0,
        rand_augment="none",
        crop="pad",
        crop_padding=4,
        hflip=0.5,
        img_size=32,
        test_crop_ratio=1.0,
        batch_size=batch_size,
        num_workers=0,
        verify_up_to=0,
    )


def decode(dataset: Any, limit: int | None, step: int = 1) -> tuple[Tensor, Tensor]:
    """Images ``(n, 3, 32, 32)`` and labels ``(n,)``, decoded once: every ``step``-th; with a limit, evenly spaced ones."""
    chosen = range(0, len(dataset), step)
    count = len(chosen) if limit is None else min(limit, len(chosen))
    samples = [dataset[chosen[i * len(chosen) // count]] for i in range(count)]
    return torch.stack([image for image, _ in samples]), torch.tensor([int(label) for _, label in samples])
