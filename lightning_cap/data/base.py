"""What the data modules share: loaders, distributed samplers, seeds per worker, the loader for calibration."""

from __future__ import annotations

import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, default_collate

from lightning_cap.errors import DataError
from lightning_cap.utilities.arguments import require_counts, require_flag, require_whole

Collate = Callable[[Any], Any]


class ClassificationDataModule(LightningDataModule, ABC):
    """Data module of an image classification set whose subclass says only what the samples are.

    Args:
        batch_size: samples per step and process.
        num_workers: worker processes a loader, 0 to read in the main process.
        pin_memory: page-locked batches; None: when CUDA is available.
        seed: of the shuffling across processes and of the calibration loader; the rest follows the global generators.
        calibration_augmentation: whether pruning sees training images with the training augmentation (paper, appendix
            O) or with the evaluation transform.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self, batch_size: int, num_workers: int, pin_memory: bool | None, seed: int, calibration_augmentation: bool
    ) -> None:
        super().__init__()
        require_counts(batch_size=batch_size)
        require_whole("num_workers", num_workers, 0, 1024, example=4)
        if pin_memory is not None:
            require_flag("pin_memory", pin_memory)
        require_whole("seed", seed, 0, 2**32 - 1)
        require_flag("calibration_augmentation", calibration_augmentation)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.seed = seed
        self.calibration_augmentation = calibration_augmentation

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes."""

    @property
    def known_classes(self) -> int | None:
        """Number of classes, as far as it is known without the data; else None."""
        return None

    @property
    def known_images(self) -> int | None:
        """Number of training images, as far as it is known without the data; else None."""
        return None

    @abstractmethod
    def training_set(self, augment: bool) -> Dataset[Any]:
        """Return the training samples, with the training augmentation or with the evaluation transform."""

    @abstractmethod
    def validation_set(self) -> Dataset[Any]:
        """Return the validation samples with the evaluation transform."""

    def training_collate(self) -> Collate:
        """Return what makes a batch of training samples (with mixup, say)."""
        return default_collate

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training loader: shuffled, augmented, without the incomplete last batch."""
        dataset = self.training_set(augment=True)
        options = self._options(self.training_collate()) | {"drop_last": True}
        if isinstance(dataset, IterableDataset):
            stream = _StreamLoader(dataset, **options)
            stream.epoch = 0 if self.trainer is None else self.trainer.current_epoch
            return stream
        sampler = self._distributed_sampler(dataset, shuffle=True)
        # No generator here: a checkpoint restores the global one, from which the order is drawn.
        loader = DataLoader(dataset, shuffle=sampler is None, sampler=sampler, **options)
        if len(loader) == 0:
            raise DataError(
                f"batch_size={self.batch_size} leaves no complete training batch of {len(dataset)} images "  # type: ignore[arg-type]
                f"on {self._world_size} process(es): use a smaller one."
            )
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation loader: every image in order."""
        dataset = self.validation_set()
        sampler = self._distributed_sampler(dataset, shuffle=False)
        return DataLoader(dataset, sampler=sampler, **self._options(default_collate))

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader for testing, which is over the validation set."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader for prediction over the validation set; Lightning itself shares it out over processes."""
        return DataLoader(self.validation_set(), **self._options(default_collate))

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Return a new loader over the training images for the empirical Fisher (paper, appendix O).

        It has its own data set and generator, so neither the training loader nor the global random state notices it,
        and it needs no `setup("fit")` before. Pruning draws from its `dataset` and `collate_fn` by index.
        """
        augment = self.calibration_augmentation
        dataset = self.training_set(augment=augment)
        options = self._options(self.training_collate() if augment else default_collate)
        shuffle = None if isinstance(dataset, IterableDataset) else True
        return DataLoader(dataset, shuffle=shuffle, generator=torch.Generator().manual_seed(self.seed), **options)

    def _options(self, collate: Collate) -> dict[str, Any]:
        # No persistent workers: their random state would not be in a checkpoint.
        rank = 0 if self.trainer is None else self.trainer.global_rank
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "pin_memory": self.pin_memory,
            "collate_fn": collate,
            "worker_init_fn": functools.partial(seed_worker, rank=rank),
        }

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _distributed_sampler(self, dataset: Dataset[Any], shuffle: bool) -> DistributedSampler[Any] | None:
        """Return this rank's sampler, None in a single process or for streams, which share themselves out.

        Lightning injects no second one where it finds one, and this one is there also when its injection is off.
        """
        if self._world_size == 1 or isinstance(dataset, IterableDataset):
            return None
        assert self.trainer is not None
        rank = self.trainer.global_rank
        return DistributedSampler(dataset, self._world_size, rank, shuffle=shuffle, seed=self.seed)


class _StreamLoader(DataLoader[Any]):
    """Loader that tells a streamed data set its epoch, on which the order of the shards depends."""

    epoch = 0

    def __iter__(self) -> Any:
        set_epoch = getattr(self.dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.epoch)
        self.epoch += 1
        return super().__iter__()


def seed_worker(worker_id: int, rank: int) -> None:
    """Seed Python, NumPy and torch in a worker from torch's seed there and the rank, so that no two share a stream.

    Args:
        worker_id: number of the worker; torch's initial seed already depends on it.
        rank: global rank of the process that owns the worker.
    """
    sequence = np.random.SeedSequence([torch.initial_seed() & (2**64 - 1), rank])
    for_python, for_torch, for_numpy = sequence.spawn(3)
    random.seed(int(for_python.generate_state(1, np.uint64)[0]))
    torch.manual_seed(int(for_torch.generate_state(1, np.uint64)[0] >> 1))
    np.random.seed(for_numpy.generate_state(4))
