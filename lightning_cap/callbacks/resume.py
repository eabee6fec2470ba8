"""Restores the random state, so that a resumed run is exact."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cap.trainer import compat
from lightning_cap.utilities import distributed, rng


def restore_random_state(held: list[Any]) -> bool:
    """Set this rank's generators to those in a callback state, and empty the list. Returns whether there were any."""
    states = list(held)
    held.clear()
    if not states:
        return False
    if len(states) != distributed.world_size():
        rank_zero_warn(
            f"The checkpoint holds the random state of {len(states)} processes, this run has {distributed.world_size()}: "
            "data order and augmentation will differ from the run that was stopped."
        )
        return False
    rng.restore(states[distributed.rank()])
    return True


def begin_epoch_anew(trainer: pl.Trainer) -> None:
    """Begin the epoch's data anew, now that the random state is the stopped run's.

    On resuming, Lightning makes the training iterator before any callback state is in force, and keeps it; a run that was
    never stopped makes it here. Loaders with a state of their own have restored it and are left alone.
    """
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    if not any(hasattr(loader, "load_state_dict") for loader in loaders):
        compat.begin_training_data_anew(trainer)
