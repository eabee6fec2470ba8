"""Schedules of rising sparsity: steps, a polynomial, an exponential, one shot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_cap.errors import ScheduleError
from lightning_cap.schedules.base import (
    SparsitySchedule,
    check_events,
    every,
    require_epoch,
    require_max_epochs,
    require_sparsity,
)
from lightning_cap.utilities.arguments import require_flag, require_real, require_whole, shown
from lightning_cap.utilities.decimals import plain_float


@dataclass(frozen=True)
class SparsitySteps(SparsitySchedule):
    """Prune to given sparsities at given epochs, as in ``SparsitySteps({0: 0.40, 20: 0.50, 40: 0.60})``.

    Args:
        steps: Sparsity to reach in ``[0, 1)`` by epoch (counted from 0). Keys may be strings of digits, as JSON, some YAML
            writers and command lines give them; see `check_events`.
        allow_decrease: Declares that a later sparsity may be lower than an earlier one. A step to 0 lifts all masks; one to
            another lower sparsity brings back the weights of largest mean gradient. Regrown weights start at zero. With
            a step to 0 among them, the others in front of it and behind it are sparse phases, each of which begins without
            momentum, as those of `AlternatingSchedule` do.

    Raises:
        ScheduleError: If the steps are empty, malformed, or decrease without being allowed to.
    """

    steps: Mapping[Any, Any]  # of int keys, jsonargparse would make whole numbers: epoch 0 of 0.5, epoch 1 of true
    allow_decrease: bool = False

    def __post_init__(self) -> None:
        require_flag("allow_decrease", self.allow_decrease)
        if not isinstance(self.steps, Mapping) or not self.steps:
            raise ScheduleError(
                f"steps={shown(self.steps)}: give the sparsity to reach by epoch, at least one, such as {{0: 0.5, 20: 0.75}}."
            )
        object.__setattr__(self, "steps", check_events(self.steps, None, allow_decrease=self.allow_decrease))

    @property
    def regrows(self) -> bool:
        """Whether a decrease is declared."""
        return self.allow_decrease

    def events(self, max_epochs: int | None) -> dict[int, float]:
        """The steps themselves; see `SparsitySchedule.events`."""
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
        _check_rise(self.initial, self.final, self.start_epoch, self.end_epoch, self.frequency)
        require_real("power", self.power, "(0, inf)", example=3, error=ScheduleError)

    def sparsity_at(self, epoch: int) -> float:
        """The polynomial at an epoch from ``start_epoch`` to ``end_epoch``."""
        _require_between(epoch, self.start_epoch, self.end_epoch)
        if epoch == self.start_epoch:
            return self.initial
        left = 1 - (epoch - self.start_epoch) / (self.end_epoch - self.start_epoch)
        return self.final - (self.final - self.initial) * float(left**self.power)

    def events(self, max_epochs: int | None) -> dict[int, float]:
        """The polynomial at every ``frequency`` epochs; see `SparsitySchedule.events`."""
        epochs = [*every(self.frequency, self.start_epoch, self.end_epoch), self.end_epoch]
        sparsities = {epoch: self.sparsity_at(epoch) for epoch in epochs}
        return check_events({epoch: s for epoch, s in sparsities.items() if s > 0}, max_epochs)


@dataclass(frozen=True)
class ExponentialSchedule(SparsitySchedule):
    """Lower the density by the same factor at every event: geometrically from ``1 - initial`` to ``1 - final``.

    ``s(e) = 1 - (1 - initial) * ((1 - final) / (1 - initial)) ** ((e - start_epoch) / (end_epoch - start_epoch))`` at the
    epochs ``start_epoch``, ``start_epoch + frequency``, ..., and always at ``end_epoch``. With ``initial=0`` the first
    event would prune nothing and is left out.

    Args:
        final: Sparsity reached at ``end_epoch``, above 0 and below 1.
        start_epoch: Epoch (counted from 0) at which the sparsity is ``initial``.
        end_epoch: Epoch at which the sparsity is ``final``; after it the model is only fine-tuned.
        initial: Sparsity at ``start_epoch``; at most ``final``.
        frequency: Epochs between two events.

    Raises:
        ScheduleError: If a value is out of range or the epochs are not in order.
    """

    final: float
    start_epoch: int
    end_epoch: int
    initial: float = 0.0
    frequency: int = 1

    def __post_init__(self) -> None:
        _check_rise(self.initial, self.final, self.start_epoch, self.end_epoch, self.frequency)

    def sparsity_at(self, epoch: int) -> float:
        """The curve at an epoch from ``start_epoch`` to ``end_epoch``, exact at both."""
        _require_between(epoch, self.start_epoch, self.end_epoch)
        if epoch in (self.start_epoch, self.end_epoch):
            return self.initial if epoch == self.start_epoch else self.final
        done = (epoch - self.start_epoch) / (self.end_epoch - self.start_epoch)
        return 1 - (1 - self.initial) * float(((1 - self.final) / (1 - self.initial)) ** done)

    def events(self, max_epochs: int | None) -> dict[int, float]:
        """The curve at every ``frequency`` epochs; see `SparsitySchedule.events`."""
        epochs = [*every(self.frequency, self.start_epoch, self.end_epoch), self.end_epoch]
        sparsities = {epoch: self.sparsity_at(epoch) for epoch in epochs}
        return check_events({epoch: s for epoch, s in sparsities.items() if s > 0}, max_epochs)


@dataclass(frozen=True)
class OneShot(SparsitySchedule):
    """Prune once; the epochs after it fine-tune the sparse model.

    Args:
        sparsity: Sparsity to reach, in ``[0, 1)``.
        epoch: The epoch (counted from 0) at whose start to prune; ``None`` prunes at the end of training, without
            any fine-tuning.

    Raises:
        ScheduleError: If a value is out of range.
    """

    sparsity: float
    epoch: int | None = 0

    def __post_init__(self) -> None:
        require_sparsity("sparsity", self.sparsity)
        if self.epoch is not None:
            require_epoch("epoch", self.epoch)

    def events(self, max_epochs: int | None) -> dict[int, float]:
        """The one event, at ``max_epochs`` if ``epoch`` is ``None``; see `SparsitySchedule.events`."""
        require_max_epochs(max_epochs)
        if self.epoch is not None:
            return check_events({self.epoch: self.sparsity}, max_epochs)
        if max_epochs is None:
            raise ScheduleError(
                "epoch=None prunes at the end of training, but the run is unlimited (max_epochs=None); "
                "give the Trainer max_epochs, or OneShot an epoch"
            )
        return {int(max_epochs): plain_float(self.sparsity)}


def _check_rise(initial: float, final: float, start_epoch: int, end_epoch: int, frequency: int) -> None:
    """Refuse a curve that does not rise from ``initial`` at ``start_epoch`` to ``final`` at a later ``end_epoch``."""
    require_sparsity("initial", initial)
    require_sparsity("final", final)
    if initial > final or final == 0:
        raise ScheduleError(
            f"final={final!r}: it must be above 0 and not below initial={initial!r}. For falling sparsities use "
            "SparsitySteps(..., allow_decrease=True)."
        )
    require_epoch("start_epoch", start_epoch)
    require_epoch("end_epoch", end_epoch)
    if end_epoch <= start_epoch:
        raise ScheduleError(
            f"end_epoch={end_epoch!r}: it is not after start_epoch={start_epoch!r}. Raise it, or use OneShot to prune once."
        )
    require_whole("frequency", frequency, example=5, error=ScheduleError)
    every(frequency, start_epoch, end_epoch)


def _require_between(epoch: int, first: int, last: int) -> None:
    require_whole("epoch", epoch, at_least=first, at_most=last, error=ScheduleError)
