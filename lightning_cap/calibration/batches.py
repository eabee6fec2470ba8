"""Calibration batches: samples and their augmentation keyed by (seed, event, global index).

So they depend neither on the number of processes nor on that of the workers, and drawing them disturbs no other loader.
"""

from __future__ import annotations

import copy
import itertools
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import is_dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate
from torch.utils.data.distributed import DistributedSampler

from lightning_cap.calibration.checks import check_samples
from lightning_cap.errors import ConfigError, DataError, GradientError
from lightning_cap.utilities import distributed, rng
from lightning_cap.utilities.arguments import require_counts, require_instance, require_iterable, require_whole

_BATCH_SIZE = 32  # where a loader does not tell its own


class CalibrationBatches:
    """This process's share of the calibration batches of one event. Re-iterable: every pass gives the same.

    A `DataLoader` is taken apart: its data set, ``collate_fn``, workers and (if it is not the plain sequential or
    shuffling one) its sampler are used, its own iterator never is. Global batch ``j`` goes to rank ``j mod R``; its
    samples, their augmentation and its collation (mixup partners) are drawn under generators seeded by
    (seed, event, index). Any other iterable is taken batch by batch as it is.

    Args:
        source: A DataLoader over a map-style or iterable data set, or a re-iterable of batches.
        num_samples: Samples wanted over all processes; the data set is drawn from again when it is exhausted.
        samples_per_gradient: Batches are a whole number of this, near the loader's own batch size.
        seed: First part of the key.
        event: Second part: the index of the pruning event in the run.
        most_gradients: Gradient samples in a batch at the most, 2 or more. All rows of a batch are held at once when several
            processes exchange them.
        sampler: What to draw the order from instead of the loader's own sampler, as where Lightning has put a distributed one
            around it. A ``range`` is the part of the data set to draw from, of an iterable one too.
        use: What the samples are for, if not for what a pruner reads: a further part of the key.

    Raises:
        ConfigError: An argument is out of range; when it is read, a gradient has more samples than the data set.
        DataError: The data set is empty.
    """

    def __init__(
        self,
        source: Iterable[Any],
        num_samples: int,
        samples_per_gradient: int,
        seed: int,
        event: int,
        most_gradients: int = 2**16,
        sampler: Iterable[Any] | None = None,
        use: rng.Domain | None = None,
    ) -> None:
        require_iterable("source", source, "a DataLoader")
        check_samples(num_samples=num_samples)
        require_counts(samples_per_gradient=samples_per_gradient, most_gradients=most_gradients)
        for name, value in (("seed", seed), ("event", event)):
            require_whole(name, value, 0)
        if sampler is not None:
            require_iterable("sampler", sampler, "loader.sampler")
        require_instance("use", use, rng.Domain, "Domain.HEAL", optional=True)
        self._source = source
        self._sampler = sampler
        self._num_samples = num_samples
        self._samples_per_gradient = samples_per_gradient
        self._key: tuple[int, ...] = (seed, event) if use is None else (seed, event, int(use))
        self._most = max(2, most_gradients // 2 * 2)  # even: timm's mixup pairs the samples of a batch

    def __iter__(self) -> Iterator[Any]:
        if not isinstance(self._source, DataLoader):
            return itertools.islice(iter(self._source), distributed.rank(), None, distributed.world_size())
        if self._source.batch_sampler is None and self._source.batch_size is None:
            raise DataError(
                "calibration data: the loader has batch_size=None, so its data set gives whole batches and single samples "
                "cannot be drawn. Define calibration_dataloader() with a batch_size."
            )
        if isinstance(self._source.dataset, IterableDataset):
            return self._stream(self._source)
        return iter(self._keyed_loader(self._source))

    @property
    def batch_size(self) -> int:
        """Samples in one batch (of a DataLoader source)."""
        per_gradient = self._samples_per_gradient
        own = getattr(self._source, "batch_size", None)
        if own is None:  # a batch sampler of the user's
            own = getattr(getattr(self._source, "batch_sampler", None), "batch_size", None) or _BATCH_SIZE
        return per_gradient * max(1, min(int(own) // per_gradient, self._most))

    def _keyed_loader(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        size = self.batch_size
        count = -(-self._num_samples // size) * size
        own_batches = [
            list(range(start, start + size))
            for start in range(distributed.rank() * size, count, distributed.world_size() * size)
        ]
        workers = min(loader.num_workers, len(own_batches))
        return DataLoader(
            _KeyedDataset(loader.dataset, self._indices(loader, count), self._key),
            batch_sampler=own_batches,
            collate_fn=_KeyedCollate(loader.collate_fn, self._key),
            num_workers=workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout if workers else 0,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context if workers else None,
            prefetch_factor=loader.prefetch_factor if workers else None,
            generator=torch.Generator().manual_seed(0),  # else the workers' base seed is drawn from the run's own
        )

    def _indices(self, loader: DataLoader[Any], count: int) -> list[int]:
        """``count`` data set indices: pass after pass of a keyed shuffle, or of the loader's own special sampler."""
        dataset = loader.dataset
        size = len(dataset) if isinstance(dataset, Sized) else 0
        if size == 0:
            raise DataError(
                "calibration data: the data set is empty. Give calibration_dataloader() at least one sample."
            )
        if size < self._samples_per_gradient:
            raise ConfigError(
                f"samples_per_gradient={self._samples_per_gradient}: the data set of the calibration has {size} samples. Give "
                f"{size} or less."
            )
        indices: list[int] = []
        for number in itertools.count():
            if len(indices) >= count:
                return indices[:count]
            with rng.preserved():
                rng.seed_by(*self._key, rng.Domain.DRAW, number)
                sampler = sampler_of(loader) if self._sampler is None else self._sampler
                drawn = _special_order(sampler) or torch.randperm(size).tolist()
            indices += drawn
        raise AssertionError("unreachable")

    def _stream(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """An iterable data set, read from its start in this process; this rank keeps its own batches."""
        collate = _KeyedCollate(loader.collate_fn or default_collate, self._key)
        most = len(self._sampler) if isinstance(self._sampler, range) else None
        samples = enumerate(_endless(cast(Iterable[Any], loader.dataset), most))
        for number in range(-(-self._num_samples // self.batch_size)):
            batch = []
            for i in range(self.batch_size):
                rng.seed_by(*self._key, rng.Domain.STREAM, number * self.batch_size + i)
                batch.append(next(samples))
            if number % distributed.world_size() == distributed.rank():
                yield collate(batch)


class _KeyedDataset(Dataset[Any]):
    """``position -> (position, sample)``, the sample drawn under generators seeded by its position."""

    def __init__(self, dataset: Any, indices: list[int], key: tuple[int, ...]) -> None:
        self._dataset, self._indices, self._key = dataset, indices, key

    def __getitem__(self, position: int) -> tuple[int, Any]:
        rng.seed_by(*self._key, rng.Domain.SAMPLE, position)
        return position, self._dataset[self._indices[position]]


class _KeyedCollate:
    """Collates under generators seeded by the batch's first position, so that mixup draws the same partners."""

    def __init__(self, collate: Callable[[list[Any]], Any], key: tuple[int, ...]) -> None:
        self._collate, self._key = collate, key

    def __call__(self, batch: list[tuple[int, Any]]) -> Any:
        rng.seed_by(*self._key, rng.Domain.COLLATE, batch[0][0])
        return self._collate([sample for _, sample in batch])


def sampler_of(loader: DataLoader[Any]) -> Iterable[Any]:
    """The order of a loader: its sampler, or that of the user's batch sampler, or the indices of all its batches."""
    if loader.batch_size is not None:
        return loader.sampler
    # with a batch sampler of the user's, the loader's own sampler means nothing
    return getattr(loader.batch_sampler, "sampler", None) or itertools.chain.from_iterable(loader.batch_sampler or ())


def _special_order(sampler: Iterable[Any]) -> list[int] | None:
    """One pass of a sampler that is more than "all, in order or shuffled", such as a weighted or subset one."""
    if isinstance(sampler, DistributedSampler) or type(sampler) in (SequentialSampler, RandomSampler):
        return None
    drawn = [int(index) for index in sampler]
    if not drawn:
        raise DataError("calibration data: the loader's sampler gives no sample.")
    return drawn


def _endless(dataset: Iterable[Any], most: int | None) -> Iterator[Any]:
    """The first ``most`` samples, over and over; None for all."""
    while True:
        empty = True
        for sample in itertools.islice(dataset, most):
            empty = False
            yield sample
        if empty:
            raise DataError("calibration data: the iterable data set is empty.")


def is_batched(leaf: Any, size: int) -> bool:
    """Whether ``leaf`` is a tensor with ``size`` samples in dim 0."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size


def batch_size(batch: Any, default: int | None = None) -> int:
    """Samples in a batch: dim 0 of its first tensor.

    Args:
        batch: Tensors in tuples, lists and dicts.
        default: What to return where no tensor has a batch dimension. Default: that is an error.

    Raises:
        GradientError: No tensor has a batch dimension, and there is no ``default``.
    """
    for leaf in flatten_batch(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    if default is None:
        raise GradientError(
            f"batches: a batch of type {type(batch).__name__} holds no tensor with a batch dimension, so it cannot be split "
            "into samples. Give tensors, or tuples, lists and dicts of them."
        )
    return default


def slice_batch(batch: Any, size: int, start: int, stop: int) -> Any:
    """Samples ``start`` to ``stop`` of a batch of ``size``: of its tensors with so many in dim 0."""
    leaves, rebuild = flatten_batch(batch)
    return rebuild([leaf[start:stop] if is_batched(leaf, size) else leaf for leaf in leaves])


def first_samples(batches: Iterable[Any], most: int) -> Iterator[tuple[Any, int, int]]:
    """This process's share of the first ``most`` samples.

    Args:
        batches: This process's batches; batch ``j`` of rank ``r`` is batch ``j·R + r`` of all.
        most: Samples over all processes.

    Yields:
        A batch with its first samples alone where it goes beyond; samples that are in it; samples of all processes up to its end,
        ``most`` when there are enough.
    """
    ranks, rank, own = distributed.world_size(), distributed.rank(), 0
    for batch in batches:
        size = batch_size(batch)
        before = own * ranks + rank * size
        if before >= most:
            return
        wanted = min(size, most - before)
        own += size
        after = most if own * ranks + rank * size >= most else before + size
        yield batch if wanted == size else slice_batch(batch, size, 0, wanted), wanted, after


def flatten_batch(batch: Any) -> tuple[list[Any], Callable[[Iterable[Any]], Any]]:
    """The leaves of a batch, and what makes such a batch of other leaves. A ``UserDict``, such as a tokenizer gives, is a node.

    Raises:
        GradientError: It holds a collection that cannot be split into samples.
    """
    leaves, spec = pytree.tree_flatten(batch)
    inner = [flatten_batch(leaf.data) if isinstance(leaf, UserDict) else None for leaf in leaves]
    for leaf, node in zip(leaves, inner, strict=True):
        if node is None and (isinstance(leaf, Mapping) or is_dataclass(leaf)):
            raise GradientError(
                f"batches: a batch holds a {type(leaf).__name__}, which cannot be split into samples. Give tensors, or tuples, "
                "lists and dicts of them: let collate_fn return dict(batch), or vars(batch)."
            )

    def rebuild(values: Iterable[Any]) -> Any:
        left = iter(values)
        parts = []
        for leaf, node in zip(leaves, inner, strict=True):
            if node is None:
                parts.append(next(left))
            else:
                copied = copy.copy(leaf)
                copied.data = node[1](list(itertools.islice(left, len(node[0]))))
                parts.append(copied)
        return pytree.tree_unflatten(parts, spec)

    return [v for leaf, node in zip(leaves, inner, strict=True) for v in (node[0] if node else [leaf])], rebuild
