"""Schedules that come back to a sparsity again and again: dense and sparse phases in turn, or one update after another."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_cap.errors import ScheduleError
from lightning_cap.schedules.base import (
    SparsitySchedule,
    check_events,
    checked_epoch,
    checked_frequency,
    checked_sparsity,
    is_int,
)


@dataclass(frozen=True)
class AlternatingSchedule(SparsitySchedule):
    """Sparse and dense phases in turn, the last one sparse (AC/DC, Peste et al. 2021, algorithm 1).

    Training is dense until ``start_epoch``. A sparse phase begins by pruning the dense weights anew, and without the momentum of
    the dense phase (also the first one, and also where the model has zeros before); a dense phase begins by lifting all masks,
    and the weights that come back start from zero.

    Args:
        sparsity: Of the sparse phases, above 0 and below 1.
        start_epoch: Epoch (counted from 0) at which the first sparse phase begins.
        sparse_epochs: Length of a sparse phase; the last one goes on to the end of training.
        dense_epochs: Length of a dense phase.
        end_epoch: Epoch at which the last sparse phase begins at the latest: a dense phase that would end later is left out.
            Default: ``sparse_epochs`` before the end of training.

    Raises:
        ScheduleError: If a value is out of range, or there is no room for a single dense phase between two sparse ones.
    """

    sparsity: float
    start_epoch: int
    sparse_epochs: int
    dense_epochs: int
    end_epoch: int | None = None

    def __post_init__(self) -> None:
        if checked_sparsity("sparsity", self.sparsity) == 0:
            raise ScheduleError("sparsity=0 makes the sparse phases dense; give a sparsity above 0")
        checked_epoch("start_epoch", self.start_epoch)
        for name, value in (("sparse_epochs", self.sparse_epochs), ("dense_epochs", self.dense_epochs)):
            if not is_int(value) or value < 1:
                raise ScheduleError(f"{name}={value!r} is not a number of epochs; give an integer >= 1")
        if self.end_epoch is not None:
            checked_epoch("end_epoch", self.end_epoch)
            self._check_room(self.end_epoch)

    @property
    def regrows(self) -> bool:
        """Yes: dense phases lift the masks."""
        return True

    def events(self, max_epochs: int | None) -> dict[int, float]:
        """``sparsity`` where a sparse phase begins, 0 where a dense one does; see :meth:`SparsitySchedule.events`."""
        if self.end_epoch is None and max_epochs is None:
            raise ScheduleError(
                "end_epoch=None ends the phases shortly before the end of training, but the run is unlimited "
                "(max_epochs=None); give AlternatingSchedule an end_epoch, or the Trainer max_epochs"
            )
        end = self.end_epoch if self.end_epoch is not None else (max_epochs or 0) - self.sparse_epochs
        self._check_room(end)
        period = self.sparse_epochs + self.dense_epochs
        sparse = range(self.start_epoch, end + 1, period)
        dense = {epoch - self.dense_epochs: 0.0 for epoch in sparse[1:]}
        return check_events({**dict.fromkeys(sparse, self.sparsity), **dense}, max_epochs, allow_decrease=True)

    def _check_room(self, end: int) -> None:
        second = self.start_epoch + self.sparse_epochs + self.dense_epochs
        if second > end:
            raise ScheduleError(
                f"the second sparse phase would begin at epoch {second}, after epoch {end}, where the last one begins at the "
                f"latest (end_epoch={self.end_epoch!r}); shorten the phases, begin them earlier or raise max_epochs, or use "
                f"OneShot for a single sparse phase"
            )


@dataclass(frozen=True)
class RepeatedSchedule(SparsitySchedule):
    """The same sparsity every ``frequency`` epochs: the updates of a pruner that drops weights and grows others.

    Args:
        sparsity: Of every event, in ``[0, 1)``.
        frequency: Epochs between two events.
        start_epoch: Epoch (counted from 0) of the first event.
        end_epoch: Epoch of the last event at the latest; after it the masks are fixed. Default: three quarters of the run, as
            Evci et al. (2020) have it.

    Raises:
        ScheduleError: If a value is out of range or the epochs are not in order.
    """

    sparsity: float
    frequency: int = 1
    start_epoch: int = 0
    end_epoch: int | None = None

    def __post_init__(self) -> None:
        checked_sparsity("sparsity", self.sparsity)
        checked_frequency(self.frequency)
        checked_epoch("start_epoch", self.start_epoch)
        if self.end_epoch is not None and checked_epoch("end_epoch", self.end_epoch) < self.start_epoch:
            raise ScheduleError(
                f"end_epoch={self.end_epoch!r} is before start_epoch={self.start_epoch!r}; raise end_epoch, or begin earlier"
            )

    def events(self, max_epochs: int | None) -> dict[int, float]:
        """Every ``frequency`` epochs; see :meth:`SparsitySchedule.events`."""
        if self.end_epoch is None and max_epochs is None:
            raise ScheduleError(
                "end_epoch=None is three quarters of the run, but the run is unlimited (max_epochs=None); give "
                "RepeatedSchedule an end_epoch, or the Trainer max_epochs"
            )
        end = self.end_epoch if self.end_epoch is not None else max(self.start_epoch, 3 * (max_epochs or 0) // 4)
        return check_events(dict.fromkeys(range(self.start_epoch, end + 1, self.frequency), self.sparsity), max_epochs)
