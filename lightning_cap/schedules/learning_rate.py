"""Learning rates of the paper: a linear decay per pruning cycle (Kuznedelev et al. 2023, equation 8), a cosine over the run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import require_instance, require_real, require_whole
from lightning_cap.utilities.decimals import plain_float


class CyclicLinearLR(LRScheduler):
    """Decay the learning rate linearly from its maximum, again and again, once per pruning cycle.

    ``lr = max - (max - min) * (t mod T) / T`` (equation 8), where ``t`` counts the calls of `step` since the
    cycle began and ``max`` is the learning rate each parameter group had at the start. The value depends on ``t``
    alone, nothing accumulates, so a restored scheduler continues exactly.

    Args:
        optimizer: The optimizer whose parameter groups are driven; their own ``lr`` is the maximum.
        min_lr: The value that the decay runs towards; at most every group's ``lr``.
        period: ``T``, in calls of `step`: optimizer steps or epochs, as the ``interval`` of Lightning's
            scheduler configuration says. ``None`` leaves it to ``CAPPruningCallback``, which sets it to each gap
            between two pruning events.
        last_epoch: As in every torch scheduler: the index of the last call of `step`, -1 for a new run.

    Attributes:
        auto_period: Whether the period was left open, so that whoever restarts the cycle should also set it.

    Raises:
        ConfigError: ``optimizer`` is none, ``min_lr`` is negative, not finite or above a group's learning rate, ``period`` is not a
            whole number of at least 1, or ``last_epoch`` not one of at least -1.
    """

    def __init__(
        self, optimizer: Optimizer, min_lr: float = 0.0, period: int | None = None, last_epoch: int = -1
    ) -> None:
        _check(optimizer, min_lr, last_epoch)
        _require_whole_or_none("period", period)
        self.min_lr = plain_float(min_lr)
        self.auto_period = period is None
        self._period = None if period is None else int(period)
        self._cycle_start = 0
        self._warned = False
        super().__init__(optimizer, last_epoch)  # takes the initial step
        _check_lowest(self)

    @property
    def period(self) -> int | None:
        """``T``, the length of a cycle in calls of `step`; ``None`` until somebody sets it."""
        return self._period

    @property
    def cycle_step(self) -> int:
        """Calls of `step` since the current cycle began, in ``[0, period)``."""
        return 0 if self._period is None else (self.last_epoch - self._cycle_start) % self._period

    def restart(self, period: int | None = None) -> None:
        """Begin a new cycle now: ``t = 0``, and the learning rate is at its maximum at once.

        Args:
            period: The length of the cycles from here on, in calls of `step`; ``None`` keeps the present one.

        Raises:
            ConfigError: ``period`` is not a whole number of at least 1.
        """
        if period is not None:
            _require_whole_or_none("period", period)
            self._period = int(period)
        self._cycle_start = self.last_epoch
        _write_lrs(self)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rate of each parameter group at the present step (equation 8)."""
        decayed = 0.0 if self._period is None else self.cycle_step / self._period
        return [float(top) - (float(top) - self.min_lr) * decayed for top in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Advance by one step and set the learning rates.

        Args:
            epoch: torch's deprecated way to jump to a step; leave it out.
        """
        if self._period is None and self.last_epoch >= 0 and not self._warned:
            self._warned = True  # no error: tuners take a few steps with all callbacks switched off
            warnings.warn(
                "period=None: CyclicLinearLR stays at its maximum until the length of a cycle is known; give period= (in "
                "scheduler steps), add CAPPruningCallback to the Trainer, or call restart(period)",
                stacklevel=2,
            )
        super().step(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain Python values, loadable with ``weights_only=True``."""
        return {
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "base_lrs": [float(lr) for lr in self.base_lrs],
            "min_lr": self.min_lr,
            "period": self._period,
            "auto_period": self.auto_period,
            "cycle_start": self._cycle_start,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, and set the optimizer's learning rates to it.

        Args:
            state_dict: The state, of a scheduler with as many parameter groups.

        Raises:
            ConfigError: It is that of another scheduler.
        """
        require_instance("state_dict", state_dict, Mapping, "scheduler.state_dict()")
        missing = sorted(self.state_dict().keys() - state_dict.keys())
        if missing:
            raise ConfigError(
                f"state_dict: it has no {missing[0]!r}. Give that of a CyclicLinearLR, from a sound checkpoint."
            )
        groups = len(self.optimizer.param_groups)
        if len(state_dict["base_lrs"]) != groups:
            raise ConfigError(
                f"state_dict: it is of {len(state_dict['base_lrs'])} parameter groups, and the optimizer has {groups}. Give it the "
                "parameter groups of the run that the checkpoint is of."
            )
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["step_count"]
        self.base_lrs = list(state_dict["base_lrs"])
        self.min_lr = state_dict["min_lr"]
        self._period = state_dict["period"]
        self.auto_period = state_dict["auto_period"]
        self._cycle_start = state_dict["cycle_start"]
        _write_lrs(self)


class CosineLR(LRScheduler):
    """Raise the learning rate linearly, then lower it along half a cosine, once over the whole run.

    With ``T`` steps, ``w`` of them to warm up: ``lr = min + (max - min) * t / w`` for ``t < w``, after that
    ``lr = min + (max - min) * (1 + cos(pi * (t - w) / (T - w))) / 2``. ``max`` is the learning rate each parameter group had at the
    start. Pruning events do not restart it.

    Args:
        optimizer: The optimizer whose parameter groups are driven; their own ``lr`` is the maximum.
        min_lr: The value at the end, and at the beginning of a warm-up; at most every group's ``lr``.
        warmup: Share of the steps in which the learning rate rises, in ``[0, 1)``.
        steps: ``T``, in calls of `step`. ``None`` leaves it to `VisionClassifier`, which sets it to the length of the run; in
            a module of your own, ``int(self.trainer.estimated_stepping_batches)``.
        last_epoch: As in every torch scheduler: the index of the last call of `step`, -1 for a new run.

    Attributes:
        steps: ``T``; ``None`` until somebody sets it.

    Raises:
        ConfigError: ``optimizer`` is none, ``min_lr`` is negative, not finite or above a group's learning rate, ``warmup`` is not
            in ``[0, 1)``, ``steps`` is not a whole number of at least 1, or ``last_epoch`` not one of at least -1.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        min_lr: float = 0.0,
        warmup: float = 0.0,
        steps: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        _check(optimizer, min_lr, last_epoch)
        require_real("warmup", warmup, "[0, 1)", example=0.05)
        _require_whole_or_none("steps", steps)
        self.min_lr, self.warmup = plain_float(min_lr), plain_float(warmup)
        self.steps = None if steps is None else int(steps)
        self._warned = False
        super().__init__(optimizer, last_epoch)  # takes the initial step
        _check_lowest(self)

    def span(self, steps: int) -> None:
        """Set the length of the run, and the learning rates to what they are at the present step of it.

        Args:
            steps: ``T``, in calls of `step`.

        Raises:
            ConfigError: It is not a whole number of at least 1.
        """
        require_whole("steps", steps, example=1000)
        self.steps = int(steps)
        _write_lrs(self)

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rate of each parameter group at the present step."""
        height = 1.0 if self.steps is None else self._height(self.last_epoch, self.steps)
        return [self.min_lr + (float(top) - self.min_lr) * height for top in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Advance by one step and set the learning rates.

        Args:
            epoch: torch's deprecated way to jump to a step; leave it out.
        """
        if self.steps is None and self.last_epoch >= 0 and not self._warned:
            self._warned = True
            warnings.warn(
                "steps=None: CosineLR stays at its maximum until the length of the run is known; give steps=, or call span(steps)",
                stacklevel=2,
            )
        super().step(epoch)

    def _height(self, step: int, steps: int) -> float:
        """Between the minimum, 0, and the maximum, 1."""
        rise = round(self.warmup * steps)
        if step < rise:
            return step / rise
        return (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise)))) / 2


def _check(optimizer: object, min_lr: object, last_epoch: int) -> None:
    """Refuse what no scheduler of these takes."""
    require_instance("optimizer", optimizer, Optimizer, "torch.optim.AdamW(model.parameters())")
    require_real("min_lr", min_lr, "[0, inf)", example=1e-5)
    require_whole("last_epoch", last_epoch, at_least=-1)
    if last_epoch >= 0 and not all("initial_lr" in group for group in optimizer.param_groups):  # type: ignore[attr-defined]
        raise ConfigError(
            f"last_epoch={last_epoch}: no scheduler has driven the optimizer before (it has no 'initial_lr'). Leave it at -1."
        )


def _check_lowest(scheduler: CyclicLinearLR | CosineLR) -> None:
    lowest = min(float(lr) for lr in scheduler.base_lrs)
    if lowest < scheduler.min_lr:
        raise ConfigError(
            f"min_lr={scheduler.min_lr!r}: it is above the learning rate of a parameter group ({lowest!r}), from which the decay "
            "starts. Lower min_lr, or raise the optimizer's lr."
        )


def _require_whole_or_none(name: str, value: object) -> None:
    if value is not None:
        require_whole(name, value, example=1000)


def _write_lrs(scheduler: CyclicLinearLR | CosineLR) -> None:
    """Put the present learning rates into the optimizer, outside of ``step``."""
    lrs = scheduler.get_lr()
    for group, lr in zip(scheduler.optimizer.param_groups, lrs, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    scheduler._last_lr = lrs
