"""Restores the random state and the order of the data, so that a resumed run is exact, also on another number of processes."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from lightning_cap.calibration.batches import sampler_of
from lightning_cap.trainer import compat
from lightning_cap.utilities import distributed, rng

_ORDER, _SIZES = "order", "batch_sizes"  # in the state of a rank, beside its generators


class DataOrder:
    """The order of the training data, as far as a seed and the epoch tell it: `DistributedSampler` has such an order.

    A run that goes on keeps that seed, whatever the seed of this process is. On one process, where Lightning puts no such sampler
    in, a plain shuffling one gives the same order.
    """

    def __init__(self) -> None:
        self._loaders: list[Any] = []
        self._seeds: list[int | None] = []
        self._kept: set[int] = set()  # loaders whose seed is the stopped run's

    def begin(self, trainer: pl.Trainer, states: Sequence[Any]) -> None:
        """Look at the training loaders; take the seeds that the states of the stopped run's ranks tell, if there are any."""
        self._loaders = _training_loaders(trainer)
        self._seeds = [
            _seed(sampler_of(loader)) if isinstance(loader, DataLoader) else None for loader in self._loaders
        ]
        self._kept = set()
        held = states[0].get(_ORDER, []) if states else []
        for number, (seed, loader) in enumerate(zip(held, self._loaders, strict=False)):
            if isinstance(seed, int) and isinstance(loader, DataLoader) and _can_follow(loader):
                self._seeds[number] = seed
                self._kept.add(number)
        if states and len(states) != distributed.world_size():
            self._warn(states)

    def begin_epoch(self, trainer: pl.Trainer) -> None:
        """To be called at the start of each epoch, before Lightning begins its data."""
        loaders = _training_loaders(trainer) if self._kept else []
        for number in self._kept:
            sampler, seed = sampler_of(loaders[number]), self._seeds[number]
            assert seed is not None
            if isinstance(sampler, DistributedSampler):
                sampler.seed = seed
            elif isinstance(sampler, RandomSampler):
                # as DistributedSampler does it
                sampler.generator = torch.Generator().manual_seed(seed + trainer.current_epoch)

    def state(self) -> dict[str, Any]:
        """For checkpoints."""
        return {_ORDER: list(self._seeds), _SIZES: _batch_sizes(self._loaders)}

    def _warn(self, states: Sequence[Any]) -> None:
        told = [
            f"The checkpoint holds the random state of {len(states)} processes, this run has {distributed.world_size()}: masks and "
            "calibration samples stay the same, augmentation and dropout do not."
        ]
        if len(self._kept) < len(self._loaders):
            told.append(
                "The order of the training data differs too: one process draws it from its random state. To keep it, give the "
                "DataLoader of a single process sampler=DistributedSampler(data_set, num_replicas=1, rank=0) from the beginning."
            )
        before, now = states[0].get(_SIZES), _batch_sizes(self._loaders)
        if before and before != now:
            told.append(
                f"An optimizer step takes batches of {now} samples over all processes instead of {before}, so that steps, learning "
                "rate and samples do not go together as before. Set batch_size so that batch_size times processes is the same."
            )
        rank_zero_warn(" ".join(told))


def _training_loaders(trainer: pl.Trainer) -> list[Any]:
    loaders = trainer.train_dataloader
    return [] if loaders is None else list(CombinedLoader(loaders).flattened)


def _batch_sizes(loaders: Sequence[Any]) -> list[int | None]:
    """Samples of a batch over all processes, of each loader."""
    sizes = [getattr(loader, "batch_size", None) for loader in loaders]
    return [size * distributed.world_size() if isinstance(size, int) else None for size in sizes]


def _seed(sampler: Any) -> int | None:
    return int(sampler.seed) if isinstance(sampler, DistributedSampler) and sampler.shuffle else None


def _can_follow(loader: DataLoader[Any]) -> bool:
    """Whether a loader can give the order of a `DistributedSampler`."""
    sampler = sampler_of(loader)
    if isinstance(sampler, DistributedSampler):
        return bool(sampler.shuffle)
    if not isinstance(sampler, RandomSampler) or type(sampler) is not RandomSampler:
        return False
    if sampler.replacement or sampler.generator is not None:
        return False
    return isinstance(loader.dataset, Sized) and sampler.num_samples == len(loader.dataset)


def random_state(order: DataOrder, generators: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """What checkpoints hold of every rank's randomness. Call it on every rank.

    Args:
        order: Of the training data.
        generators: Captured before. Default: as they are now.
    """
    return distributed.gather_objects({**(generators or rng.capture()), **order.state()})


def restore_random_state(held: list[Any]) -> bool:
    """Set this rank's generators to those in a callback state, and empty the list. Returns whether there were any.

    Where there are more ranks than states, further ones get generators of their own, which depend on nothing but the states.
    """
    states = list(held)
    held.clear()
    if not states:
        return False
    rank = distributed.rank()
    rng.restore(states[rank % len(states)])
    if rank >= len(states):
        rng.seed_by(int(torch.randint(2**31, ())), rank)
    return True


def begin_epoch_anew(trainer: pl.Trainer) -> None:
    """Begin the epoch's data anew, now that the random state is the stopped run's.

    On resuming, Lightning makes the training iterator before any callback state is in force, and keeps it; a run that was
    never stopped makes it here. Loaders with a state of their own have restored it and are left alone.
    """
    if not any(hasattr(loader, "load_state_dict") for loader in _training_loaders(trainer)):
        compat.begin_training_data_anew(trainer)
