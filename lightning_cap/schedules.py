"""When to prune to which sparsity: pure functions of the epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

from lightning_cap.errors import ScheduleError


class SparsitySchedule(ABC):
    """Says at the start of which epochs to prune, and to which sparsity.

    A sparsity is the fraction of zeros, those already there included, over all weights of the targets. A subclass of
    your own implements :meth:`events` and passes what it computed through :func:`check_events`.
    """

    @abstractmethod
    def events(self, max_epochs: int | None) -> dict[int, float]:
        """The pruning events of a run.

        Args:
            max_epochs: The number of epochs of the run; ``None`` means unlimited.

        Returns:
            Target sparsity in ``[0, 1)`` by epoch, in order. An event takes place at the *start* of its epoch (counted
            from 0); the epoch ``max_epochs`` means the end of training.

        Raises:
            ScheduleError: If the schedule does not fit into ``max_epochs`` epochs.
        """


def check_events(
    events: Mapping[int, float], max_epochs: int | None, *, allow_decrease: bool = False
) -> dict[int, float]:
    """Check the events of a schedule and put them in order.

    Args:
        events: Target sparsity by epoch.
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
        sorted((_epoch("epoch", _key(e)), _sparsity(f"sparsity at epoch {e}", s)) for e, s in events.items())
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


@dataclass(frozen=True)
class SparsitySteps(SparsitySchedule):
    """Prune to given sparsities at given epochs, as in ``SparsitySteps({0: 0.40, 20: 0.50, 40: 0.60})``.

    Args:
        steps: Target sparsity in ``[0, 1)`` by epoch (counted from 0). Keys may be strings of integers, as JSON
            and some YAML writers give them.
        allow_decrease: Declares that a later sparsity may be lower than an earlier one. Pruned weights do not grow back yet:
            a step below the sparsity that is reached warns and changes nothing.

    Raises:
        ScheduleError: If the steps are empty, malformed, or decrease without being allowed to.
    """

    steps: dict[int, float]
    allow_decrease: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.steps, Mapping):
            raise ScheduleError(f"steps={self.steps!r} is not a mapping; write {{epoch: sparsity}}, as in {{0: 0.5}}")
        object.__setattr__(self, "steps", check_events(self.steps, None, allow_decrease=self.allow_decrease))

    def events(self, max_epochs: int | None) -> dict[int, float]:
        """The steps themselves; see :meth:`SparsitySchedule.events`."""
        return check_events(self.steps, max_epochs, allow_decrease=self.allow_decrease)


@dataclass(frozen=True)
class PolynomialSchedule(SparsitySchedule):
    """Raise the sparsity along a polynomial: fast at first, gently at the end (Zhu & Gupta 2017, equation 1).

    ``s(e) = final + (initial - final) * (1 - (e - start_epoch) / (end_epoch - start_epoch)) ** power`` at the epochs
    ``start_epoch``, ``start_epoch + frequency``, ..., and always at ``end_epoch``. With ``initial=0`` the first event
    would prune nothing and is left out.

    Args:
        final: Sparsity reached at ``end_epoch``, in ``[0, 1)``.
        start_epoch: Epoch (counted from 0) at which the sparsity is ``initial``.
        end_epoch: Epoch at which the sparsity is ``final``; after it the model is only fine-tuned.
        initial: Sparsity at ``start_epoch``; at most ``final``.
        frequency: Epochs between two events.
        power: 3 is the cubic schedule, 1 the linear one.

    Raises:
        ScheduleError: If a value is out of range or the epochs are not in order.
    """

    final: float
    start_epoch: int
    end_epoch: int
    initial: float = 0.0
    frequency: int = 1
    power: float = 3.0

    def __post_init__(self) -> None:
        final, initial = _sparsity("final", self.final), _sparsity("initial", self.initial)
        start, end = _epoch("start_epoch", self.start_epoch), _epoch("end_epoch", self.end_epoch)
        if initial > final or final == 0:
            raise ScheduleError(
                f"final={self.final!r} must be above 0 and not below initial={self.initial!r}; "
                f"for falling sparsities use SparsitySteps(..., allow_decrease=True)"
            )
        if end <= start:
            raise ScheduleError(
                f"end_epoch={self.end_epoch!r} is not after start_epoch={self.start_epoch!r}; "
                f"raise end_epoch, or use OneShot to prune once"
            )
        if not _is_int(self.frequency) or self.frequency < 1:
            raise ScheduleError(f"frequency={self.frequency!r} is not a number of epochs; give an integer >= 1")
        if not (_is_real(self.power) and 0 < self.power < float("inf")):
            raise ScheduleError(f"power={self.power!r} is not a positive number; 3 is cubic, 1 is linear")

    def sparsity_at(self, epoch: int) -> float:
        """The polynomial at an epoch between ``start_epoch`` and ``end_epoch``."""
        if epoch == self.start_epoch:
            return self.initial
        left = 1 - (epoch - self.start_epoch) / (self.end_epoch - self.start_epoch)
        return self.final - (self.final - self.initial) * float(left**self.power)

    def events(self, max_epochs: int | None) -> dict[int, float]:
        """The polynomial at every ``frequency`` epochs; see :meth:`SparsitySchedule.events`."""
        epochs = [*range(self.start_epoch, self.end_epoch, self.frequency), self.end_epoch]
        sparsities = {epoch: self.sparsity_at(epoch) for epoch in epochs}
        return check_events({epoch: s for epoch, s in sparsities.items() if s > 0}, max_epochs)


@dataclass(frozen=True)
class OneShot(SparsitySchedule):
    """Prune once; the epochs after it fine-tune the sparse model.

    Args:
        sparsity: Target sparsity, in ``[0, 1)``.
        epoch: The epoch (counted from 0) at whose start to prune; ``None`` prunes at the end of training, without
            any fine-tuning.

    Raises:
        ScheduleError: If a value is out of range.
    """

    sparsity: float
    epoch: int | None = 0

    def __post_init__(self) -> None:
        _sparsity("sparsity", self.sparsity)
        if self.epoch is not None:
            _epoch("epoch", self.epoch)

    def events(self, max_epochs: int | None) -> dict[int, float]:
        """The one event, at ``max_epochs`` if ``epoch`` is ``None``; see :meth:`SparsitySchedule.events`."""
        if self.epoch is not None:
            return check_events({self.epoch: self.sparsity}, max_epochs)
        if max_epochs is None:
            raise ScheduleError(
                "epoch=None prunes at the end of training, but the run is unlimited (max_epochs=None); "
                "give the Trainer max_epochs, or OneShot an epoch"
            )
        return {max_epochs: float(self.sparsity)}


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _key(epoch: Any) -> Any:
    """The epoch of a mapping's key; strings of digits are taken, since JSON and YAML keys may be strings."""
    return int(epoch) if isinstance(epoch, str) and epoch.strip().isdecimal() else epoch


def _epoch(name: str, value: Any) -> int:
    """An epoch as a plain int."""
    if not _is_int(value) or value < 0:
        raise ScheduleError(f"{name}={value!r} is not an epoch; give an integer >= 0 (epochs are counted from 0)")
    return int(value)


def _sparsity(name: str, value: Any) -> float:
    """A sparsity as a plain float."""
    if not _is_real(value) or not 0 <= value < 1:
        raise ScheduleError(f"{name}={value!r} is not a sparsity; give the fraction of zeros, 0 <= sparsity < 1")
    return float(value)
