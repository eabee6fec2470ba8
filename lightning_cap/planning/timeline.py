"""Sparsity and learning rate over a run: its own schedulers are stepped, and restarted at its events."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_cap.callbacks.lr_restart import restart_schedulers
from lightning_cap.planning.run_plan import EpochPlan, TimelinePlan

_MOST_POINTS = 1000  # epochs that are told
_STEPS = 24  # of an epoch where only their share of the cycle matters
_UNLIMITED = 100  # epochs that are told of a run without an end, at the least


@dataclass
class _Clock:
    """What `restart_schedulers` asks of a Trainer, at any epoch."""

    lr_scheduler_configs: Sequence[Any]
    callbacks: Sequence[Any]
    max_epochs: int | None
    max_steps: int
    num_training_batches: float
    accumulate_grad_batches: int
    current_epoch: int = 0
    global_step: int = 0


def make_timeline(
    trainer: pl.Trainer, goals: Mapping[int, float], starts: Sequence[int], samples: int, known: bool
) -> TimelinePlan:
    """Step the schedulers of a Trainer through its run.

    Args:
        trainer: In ``fit``, before the first step; its schedulers cannot be used afterwards.
        goals: Epoch -> goal of the events.
        starts: Epochs at which a cycle begins.
        samples: For training, all in all.
        known: Whether that number is known.
    """
    limited = trainer.max_epochs not in (None, -1)
    epochs = int(trainer.max_epochs) if limited else max([_UNLIMITED, *(epoch + 1 for epoch in goals)])  # type: ignore[arg-type]
    batches = trainer.num_training_batches
    steps = max(1, math.ceil(batches / trainer.accumulate_grad_batches)) if math.isfinite(batches) else 1
    if trainer.max_steps != -1:
        epochs = min(epochs, -(-trainer.max_steps // steps))
    configs = trainer.lr_scheduler_configs
    alike = all(getattr(config.scheduler, "auto_period", False) for config in configs) and trainer.max_steps == -1
    stepped = min(steps, _STEPS) if alike else steps
    clock = _Clock(
        configs,
        trainer.callbacks,  # type: ignore[attr-defined]
        trainer.max_epochs,
        trainer.max_steps,
        stepped * trainer.accumulate_grad_batches,
        trainer.accumulate_grad_batches,
    )
    points, every = [], max(1, epochs // _MOST_POINTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for epoch in range(epochs):
            clock.current_epoch = epoch
            if epoch in starts or epoch == 0:
                restart_schedulers(clock, starts, {type(config.scheduler).__name__ for config in configs})  # type: ignore[arg-type]
            first, last = _epoch(trainer, stepped)
            clock.global_step += stepped
            if epoch % every == 0 or epoch in goals or epoch == epochs - 1:
                reached = [goal for at, goal in goals.items() if at <= epoch]
                points.append(EpochPlan(epoch, reached[-1] if reached else 0.0, first, last))
    name = type(configs[0].scheduler).__name__ if configs else ""
    return TimelinePlan(
        epochs if limited or trainer.max_steps != -1 else -1, steps, samples, known, name, tuple(points)
    )


def _epoch(trainer: pl.Trainer, steps: int) -> tuple[float, float]:
    """Learning rates of the first and the last step."""
    by_step = [c for c in trainer.lr_scheduler_configs if c.interval == "step"]
    first = last = _lr(trainer)
    for step in range(steps):
        last = _lr(trainer)
        for config in by_step:
            if (step + 1) % config.frequency == 0:
                _step(config.scheduler)
    for config in trainer.lr_scheduler_configs:
        if config.interval == "epoch":
            _step(config.scheduler)
    return first, last


def _lr(trainer: pl.Trainer) -> float:
    return float(trainer.optimizers[0].param_groups[0]["lr"]) if trainer.optimizers else 0.0


def _step(scheduler: Any) -> None:
    """One step; of a scheduler that follows a metric none, as no metric is known."""
    if isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step()
