"""A run that only begins, in one process, and what plans of training and of comparisons have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelPruning, StochasticWeightAveraging
from torch import nn

from lightning_cap.calibration.gradients import rows_at_once
from lightning_cap.calibration.sources import NO_MEMORY, SourceMemory, Trial
from lightning_cap.calibration.statistics import GradientSamples, Statistic
from lightning_cap.callbacks.saving_run import SavingRun
from lightning_cap.errors import UnsupportedError
from lightning_cap.fisher.memory_plan import Deployment
from lightning_cap.healing.batchnorm import NUM_SAMPLES
from lightning_cap.planning.random_data import RandomData
from lightning_cap.planning.run_plan import EventPlan, PruningPlan
from lightning_cap.planning.seconds import Calibration
from lightning_cap.pruners import Pruner
from lightning_cap.pruners.base import heal_of
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.calibration import (
    calibrating,
    calibration_loss,
    calibration_source,
    loss_scale,
    precision_context,
)
from lightning_cap.trainer.saving import goal_name
from lightning_cap.utilities.compiled import plain_module
from lightning_cap.utilities.machine import this_machine


class PlannedError(Exception):
    """Ends a run of which all is known."""


class PlanTrainer(pl.Trainer):
    """A Trainer in which nothing is written."""

    plans = True


def dry_trainer(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> PlanTrainer:
    """A Trainer of one process with the settings of another that a plan depends on."""
    return PlanTrainer(
        accelerator="cpu" if isinstance(trainer.accelerator, CPUAccelerator) else "auto",
        devices=1,
        precision=trainer.precision,
        logger=False,
        callbacks=callbacks,
        fast_dev_run=trainer.fast_dev_run,  # type: ignore[attr-defined, unused-ignore]
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        limit_train_batches=trainer.limit_train_batches,
        limit_val_batches=trainer.limit_val_batches,
        overfit_batches=getattr(trainer, "overfit_batches", 0.0),
        num_sanity_val_steps=0,
        check_val_every_n_epoch=trainer.check_val_every_n_epoch,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=trainer.default_root_dir,
    )


def run_dry(run: Callable[[], Any]) -> None:
    """Run what ends with `PlannedError`.

    Raises:
        UnsupportedError: It ended otherwise.
    """
    try:
        run()
    except PlannedError:
        return
    raise UnsupportedError(
        "plan: the run ended before it began. Look at limit_train_batches, max_epochs and max_steps."
    )


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Without warnings of Lightning and torch; those of ours are kept in a list."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    for warning in caught:
        text = " ".join(str(warning.message).split())
        if "lightning_cap" in warning.filename and text not in told:
            told.append(text)


def matters(callback: pl.Callback) -> bool:
    """Whether a plan depends on a callback. Others may write files when a run begins."""
    averaging = getattr(pl.callbacks, "WeightAveraging", StochasticWeightAveraging)
    kinds = (SavingRun, ModelPruning, GradientAccumulationScheduler, StochasticWeightAveraging, averaging)
    return isinstance(callback, kinds)


def memory_notes(deployment: Deployment | None) -> list[str]:
    """What is not known of the memory."""
    if deployment is None or deployment.device_bytes is not None:
        return []
    return ["the memory of the devices is not known: give --device_memory, such as 80GB, for passes and offload"]


def mending_notes(pruners: Iterable[Pruner], recalibrate: bool) -> list[str]:
    """What is read besides what the pruners read, of which no seconds are told.

    Args:
        pruners: Of the run.
        recalibrate: Whether batch norm is estimated anew.
    """
    found = sorted({(heal.num_inputs, heal.passes) for heal in map(heal_of, pruners) if heal is not None})
    notes = [f"after each collection {count} samples are read for healing, by {passes}" for count, passes in found]
    if recalibrate:
        notes.append(f"after each event {NUM_SAMPLES} samples are read for batch norm, by forward passes alone")
    return [f"{note}; its seconds and memory are not in the plan" for note in notes]


def samples_to_try(pruners: Iterable[Pruner], measure: bool) -> int | None:
    """Samples of a batch that tell what reading batches takes; None for a whole one.

    What gradient rows take is told by one or two of them: all that a run does with whole batches would take long for large models.

    Args:
        pruners: Of the run.
        measure: Whether seconds are measured, so that it need not be the quickest.
    """
    kinds = [pruner.statistic for pruner in pruners]
    if all(kind is None or isinstance(kind, GradientSamples) for kind in kinds):
        return 2 if measure else 1
    return None


def whole_memory(trial: Trial | None, statistic: Statistic | None, targets: Targets, data: RandomData) -> SourceMemory:
    """What reading whole batches takes, as a trial of a few samples has told.

    Args:
        trial: None for no statistic.
        statistic: Of the pruner.
        targets: What it prunes.
        data: Random, with batches as large as those of the run.
    """
    if trial is None:
        return NO_MEMORY
    if not isinstance(statistic, GradientSamples):
        return trial.memory
    batches = statistic.batches(data.train_dataloader(), targets, (0, 0))
    rows = max(1, batches.batch_size // statistic.per_sample)
    if trial.vmap:
        rows = min(rows, rows_at_once(targets))
        return replace(trial.memory, most=rows, batch=rows)
    return replace(trial.memory, batch=rows)


def pruning_plan(
    pruner: Pruner,
    targets: Any,
    choice: int,
    events: list[EventPlan],
    memory: Any,
    seconds: Any,
    goals: list[float],
    label: str | None = None,
) -> PruningPlan:
    """The record of what one pruner does.

    Args:
        pruner: The method.
        targets: What it prunes.
        choice: Their place among the choices.
        events: That it does.
        memory: Of one event.
        seconds: Of one collection, by phase.
        goals: All of them.
        label: Default: the class of the pruner.
    """
    prices = ""
    if targets.units is not None and pruner.takes_units:
        prices = pruner.cost.unit_prices(targets.units, targets.shapes).summary(goals)
    statistic = pruner.statistic
    return PruningPlan(
        label=type(pruner).__name__ if label is None else label,
        settings=repr(pruner),
        choice=choice,
        counted=goal_name(pruner),
        prices=prices,
        events=tuple(events),
        unit="" if statistic is None else statistic.unit,
        samples=0 if statistic is None else int(getattr(statistic, "n", statistic.num_samples)),
        memory=memory,
        seconds=seconds,
    )


def calibration_of(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Calibration:
    """What an event of a run reads with."""
    calibration_source(trainer, module)  # refused as in a run
    return Calibration(
        module,
        calibration_loss(module),
        batch,
        partial(calibrating, trainer, module),
        precision_context(trainer),
        loss_scale(trainer),
    )


def model_name(module: pl.LightningModule) -> str:
    """Of the architecture, where a timm model tells it; else of the class."""
    inner = plain_module(getattr(module, "model", module))
    cfg = getattr(inner, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, dict) else None
    return str(name) if name else type(inner).__name__


def measured_on(module: nn.Module) -> str:
    """The machine that seconds are measured on, in words."""
    found = this_machine(next(module.parameters()).device)
    return found.accelerator or f"{found.processor}, {torch.get_num_threads()} threads"
