"""Schedules that come back to a sparsity again and again: dense and sparse phases in turn, or one update after another."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_cap.errors import ScheduleError
from lightning_cap.schedules.base import (
    SparsitySchedule,
    check_events,
    every,
    require_epoch,
    require_max_epochs,
    require_sparsity,
)
from lightning_cap.utilities.arguments import require_whole


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
        last_dense_epochs: Length of the last dense phase. Default: as the others.

    Raises:
        ScheduleError: If a value is out of range, or there is no room for a single dense phase between two sparse ones.
    """

    sparsity: float
    start_epoch: int
    sparse_epochs: int
    dense_epochs: int
    end_epoch: int | None = None
    last_dense_epochs: int | None = None

    def __post_init__(self) -> None:
        require_sparsity("sparsity", self.sparsity)
        if self.sparsity == 0:
            raise ScheduleError(
                f"sparsity={self.sparsity!r}: the sparse phases would be dense. Give a sparsity above 0."
            )
        require_epoch("start_epoch", self.start_epoch)
        require_whole("sparse_epochs", self.sparse_epochs, example=5, error=ScheduleError)
        require_whole("dense_epochs", self.dense_epochs, example=5, error=ScheduleError)
        if self.last_dense_epochs is not None:
            require_whole("last_dense_epochs", self.last_dense_epochs, example=10, error=ScheduleError)
        if self.end_epoch is not None:
            require_epoch("end_epoch", self.end_epoch)
            self._check_room(self.end_epoch)

    @property
    def regrows(self) -> bool:
        """Yes: dense phases lift the masks."""
        return True

    def events(self, max_epochs: int | None) -> dict[int, float]:
        """``sparsity`` where a sparse phase begins, 0 where a dense one does; see `SparsitySchedule.events`."""
        require_max_epochs(max_epochs)
        if self.end_epoch is None and max_epochs is None:
            raise ScheduleError(
                "end_epoch=None ends the phases shortly before the end of training, but the run is unlimited "
                "(max_epochs=None); give AlternatingSchedule an end_epoch, or the Trainer max_epochs"
            )
        end = self.end_epoch if self.end_epoch is not None else (max_epochs or 0) - self.sparse_epochs
        self._check_room(end)
        last_pair = self.sparse_epochs + self._last_dense
        followed = every(self.sparse_epochs + self.dense_epochs, self.start_epoch, end - last_pair + 1)
        dense = {epoch + self.sparse_epochs: 0.0 for epoch in followed}
        sparse = [*followed, followed[-1] + last_pair]
        return check_events({**dict.fromkeys(sparse, self.sparsity), **dense}, max_epochs, allow_decrease=True)

    @property
    def _last_dense(self) -> int:
        return self.dense_epochs if self.last_dense_epochs is None else self.last_dense_epochs

    def _check_room(self, end: int) -> None:
        second = self.start_epoch + self.sparse_epochs + self._last_dense
        if second > end:
            raise ScheduleError(
                f"end_epoch={self.end_epoch!r}: the second sparse phase would begin at epoch {second}, after epoch {end}, where "
                "the last one begins at the latest. Shorten the phases, begin them earlier or raise max_epochs, or use OneShot for "
                "a single sparse phase."
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
        require_sparsity("sparsity", self.sparsity)
        require_whole("frequency", self.frequency, example=5, error=ScheduleError)
        require_epoch("start_epoch", self.start_epoch)
        if self.end_epoch is not None:
            require_epoch("end_epoch", self.end_epoch)
            if self.end_epoch < self.start_epoch:
                raise ScheduleError(
                    f"end_epoch={self.end_epoch!r}: it is before start_epoch={self.start_epoch!r}. Raise it, or begin earlier."
                )

    def events(self, max_epochs: int | None) -> dict[int, float]:
        """Every ``frequency`` epochs; see `SparsitySchedule.events`."""
        require_max_epochs(max_epochs)
        if self.end_epoch is None and max_epochs is None:
            raise ScheduleError(
                "end_epoch=None is three quarters of the run, but the run is unlimited (max_epochs=None); give "
                "RepeatedSchedule an end_epoch, or the Trainer max_epochs"
            )
        end = self.end_epoch if self.end_epoch is not None else max(self.start_epoch, 3 * (max_epochs or 0) // 4)
        return check_events(dict.fromkeys(every(self.frequency, self.start_epoch, end + 1), self.sparsity), max_epochs)
