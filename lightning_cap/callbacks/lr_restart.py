"""Begins a new learning-rate cycle in a running Trainer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cap.errors import ConfigError, ScheduleError
from lightning_cap.schedules.learning_rate import CosineLR


def restart_schedulers(
    trainer: pl.Trainer, event_epochs: Collection[int], warned: set[str], only_new: bool = False
) -> None:
    """Restart every scheduler that has ``restart()``; a `CyclicLinearLR` without a period gets the gap to the next event.

    Args:
        trainer: In ``fit``, at the start of a cycle.
        event_epochs: Epochs of all events.
        warned: Names of schedulers without ``restart()``, each warned about once; added to.
        only_new: Leave alone those that are in a cycle already, as after resuming.

    Raises:
        ConfigError: The length of the last cycle cannot be told.
    """
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, CosineLR):  # once over the whole run, whatever is pruned
            continue
        restart = getattr(config.scheduler, "restart", None)
        if only_new and getattr(config.scheduler, "period", 1) is not None:
            continue
        if not callable(restart):
            name = type(config.scheduler).__name__
            if name not in warned:
                rank_zero_warn(
                    f"{name} has no restart(), so its learning rate goes on as if nothing were pruned. Use "
                    "lightning_cap.CyclicLinearLR for a new cycle after each event (equation 8 of the paper)."
                )
            warned.add(name)
        elif getattr(config.scheduler, "auto_period", False) and "period" in inspect.signature(restart).parameters:
            _gap(
                trainer, event_epochs, config.interval, max(event_epochs, default=0)
            )  # fail now, not in the last cycle
            gap = _gap(trainer, event_epochs, config.interval, trainer.current_epoch)
            restart(period=max(1, gap // config.frequency))
        else:
            restart()


def refuse_beyond_max_steps(trainer: pl.Trainer, event_epochs: Collection[int]) -> None:
    """Refuse events that come after ``max_steps`` has ended training.

    Raises:
        ScheduleError: An event's epoch begins after the last step.
    """
    if trainer.max_steps == -1 or not event_epochs:
        return
    last = max(event_epochs)
    begins = trainer.global_step + sum(_optimizer_steps(trainer, e) for e in range(trainer.current_epoch, last))
    if begins >= trainer.max_steps and last != trainer.max_epochs:
        raise ScheduleError(
            f"schedule: the event of epoch {last} would come after step {begins}, but max_steps={trainer.max_steps} ends training "
            "before. Prune earlier or raise max_steps."
        )


def _gap(trainer: pl.Trainer, event_epochs: Collection[int], interval: str, epoch: int) -> int:
    """Optimizer steps or epochs from an epoch's start to the next event, or to the end of training."""
    last = None if trainer.max_epochs in (None, -1) else trainer.max_epochs
    end = min((e for e in event_epochs if e > epoch), default=last)
    steps_left = math.inf if trainer.max_steps == -1 else trainer.max_steps - trainer.global_step
    steps = math.inf if end is None else sum(_optimizer_steps(trainer, e) for e in range(epoch, end))
    gap = (math.inf if end is None else end - epoch) if interval == "epoch" else min(steps, steps_left)
    if not math.isfinite(gap):
        raise ConfigError(
            "period=None: CyclicLinearLR cannot tell how many steps there are to the next event or the end of training. Give it a "
            "period=, or the Trainer max_epochs and a training loader with a length, or max_steps."
        )
    return max(1, int(gap))


def _optimizer_steps(trainer: pl.Trainer, epoch: int) -> float:
    """Optimizer steps of an epoch, also under a GradientAccumulationScheduler."""
    accumulate = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            accumulate = callback.get_accumulate_grad_batches(epoch)
    batches = trainer.num_training_batches
    return math.ceil(batches / accumulate) if math.isfinite(batches) else math.inf
