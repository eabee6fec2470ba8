"""What a schedule is: a pure function from the epochs of a run to sparsities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

from lightning_cap.errors import ScheduleError
from lightning_cap.utilities.arguments import shown


class SparsitySchedule(ABC):
    """Says at the start of which epochs to prune, and to which sparsity.

    A sparsity is the fraction of zeros, those already there included, over all weights of the targets. A subclass of
    your own implements :meth:`events` and passes what it computed through :func:`check_events`.
    """

    @property
    def regrows(self) -> bool:
        """Whether pruned weights come back at an event whose sparsity is below the one that is reached."""
        return False

    @abstractmethod
    def events(self, max_epochs: int | None) -> dict[int, float]:
        """The pruning events of a run.

        Args:
            max_epochs: The number of epochs of the run; ``None`` means unlimited.

        Returns:
            Sparsity to reach in ``[0, 1)`` by epoch, in order. An event takes place at the *start* of its epoch (counted
            from 0); the epoch ``max_epochs`` means the end of training.

        Raises:
            ScheduleError: If the schedule does not fit into ``max_epochs`` epochs.
        """


def check_events(
    events: Mapping[int, float], max_epochs: int | None, *, allow_decrease: bool = False
) -> dict[int, float]:
    """Check the events of a schedule and put them in order.

    Args:
        events: Sparsity to reach by epoch.
        max_epochs: The number of epochs of the run; ``None`` means unlimited.
        allow_decrease: Whether a later sparsity may be lower than an earlier one.

    Returns:
        The same events ordered by epoch, as plain ints and floats.

    Raises:
        ScheduleError: If there are none, if an epoch or a sparsity is not one, if the sparsity falls although
            ``allow_decrease`` is not set, or if an event lies beyond the last epoch.
    """
    if not events:
        raise ScheduleError(f"the schedule has no pruning event ({events!r}); give at least one {{epoch: sparsity}}")
    ordered = dict(
        sorted(
            (checked_epoch("epoch", _key(e)), checked_sparsity(f"sparsity at epoch {e}", s)) for e, s in events.items()
        )
    )
    if len(ordered) < len(events):
        raise ScheduleError(f"the schedule names an epoch twice ({list(events)!r}); give each epoch once")
    steps = list(ordered.items())
    if not allow_decrease:
        for (epoch, sparsity), (later, lower) in pairwise(steps):
            if lower < sparsity:
                raise ScheduleError(
                    f"the schedule decreases from sparsity {sparsity} at epoch {epoch} to {lower} at epoch {later}; "
                    f"pruned weights do not come back: raise the later one, or declare it with "
                    f"SparsitySteps(..., allow_decrease=True)"
                )
    last_event = steps[-1][0]
    if max_epochs is not None and last_event >= max_epochs:
        raise ScheduleError(
            f"the schedule prunes at the start of epoch {last_event}, but with max_epochs={max_epochs} the last epoch "
            f"is {max_epochs - 1}; prune earlier or raise the Trainer's max_epochs"
        )
    return ordered


def is_int(value: Any) -> bool:
    """Whether ``value`` is a whole number, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Whether ``value`` is a real number, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _key(epoch: Any) -> Any:
    """The epoch of a mapping's key; strings of digits are taken, since JSON and YAML keys may be strings."""
    return int(epoch) if isinstance(epoch, str) and epoch.strip().isdecimal() else epoch


def checked_epoch(name: str, value: Any) -> int:
    """An epoch as a plain int."""
    if not is_int(value) or value < 0:
        raise ScheduleError(f"{name}={value!r} is not an epoch; give an integer >= 0 (epochs are counted from 0)")
    return int(value)


def checked_sparsity(name: str, value: Any) -> float:
    """A sparsity as a plain float."""
    if not is_real(value) or not 0 <= value < 1:
        raise ScheduleError(f"{name}={shown(value)} is not a sparsity; give the fraction of zeros, 0 <= sparsity < 1")
    return float(value)


def checked_frequency(value: Any) -> int:
    """A number of epochs between events as a plain int."""
    if not is_int(value) or value < 1:
        raise ScheduleError(f"frequency={value!r} is not a number of epochs; give an integer >= 1")
    return int(value)
