"""The plan of a training run: its callbacks begin it on random data, and it stops before the first step."""

from __future__ import annotations

import itertools
from contextlib import ExitStack

import lightning.pytorch as pl

from lightning_cap.callbacks.checks import refuse_foreign_records, refuse_sharding
from lightning_cap.callbacks.companions import cycle_starts
from lightning_cap.callbacks.pruning import CAPPruningCallback
from lightning_cap.callbacks.run_files import checkpoint_dir
from lightning_cap.callbacks.saving_run import SavingRun
from lightning_cap.callbacks.steps import pruners_of, steps_to_come
from lightning_cap.fisher.memory_plan import Deployment, planned_for
from lightning_cap.planning.choice import choice_of, layer_flops
from lightning_cap.planning.dry_run import (
    PlannedError,
    calibration_of,
    dry_trainer,
    matters,
    measured_on,
    memory_notes,
    mending_notes,
    model_name,
    pruning_plan,
    quiet,
    run_dry,
    samples_to_try,
    whole_memory,
)
from lightning_cap.planning.files import (
    checkpoint_bytes,
    cycle_files,
    lightning_files,
    optimizer_bytes,
    tensor_bytes,
    weight_bytes,
)
from lightning_cap.planning.machine import Settings, machine_of
from lightning_cap.planning.random_data import RandomData, random_data
from lightning_cap.planning.run_plan import EventPlan, FilePlan, MachinePlan, PruningPlan, RunPlan
from lightning_cap.planning.seconds import Calibration, collection_seconds, event_seconds, plan_record
from lightning_cap.planning.timeline import make_timeline
from lightning_cap.trainer import compat
from lightning_cap.trainer.calibration import (
    to_device,
)
from lightning_cap.trainer.saving import goal_name


def plan_fit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: pl.LightningDataModule | None,
    settings: Settings | None = None,
) -> RunPlan:
    """What ``fit`` would do and cost, without its data, and without training.

    The module and the callbacks are used up: make them anew for a run.

    Args:
        trainer: As configured; on the CPU where its accelerator is not here (see `Settings`). It is not run.
        module: What is to be trained.
        data: Asked for nothing but its settings.
        settings: Of the plan.

    Raises:
        CAPError: What ``fit`` would refuse, as far as no data is needed for it.
    """
    settings = Settings() if settings is None else settings
    refuse_sharding(trainer)
    given, known = random_data(module, data, max(1, trainer.world_size), settings.train_images)
    pruners = [callback.pruner for callback in trainer.callbacks if isinstance(callback, SavingRun)]  # type: ignore[attr-defined]
    given.tried = samples_to_try(pruners, settings.measure)
    probe = _Probe(trainer, settings, given, known)
    dry = dry_trainer(trainer, [probe, *(c for c in trainer.callbacks if matters(c))])  # type: ignore[attr-defined]
    with quiet() as told, probe:
        run_dry(lambda: dry.fit(module, datamodule=given))
    assert probe.plan is not None
    return probe.plan.with_notes(told)


class _Probe(pl.Callback):
    """Looks at a run when all callbacks have begun it, and ends it.

    Args:
        configured: The Trainer that is planned for.
        settings: Of the plan.
        data: Random.
        known: Whether its number of images is known.
    """

    def __init__(self, configured: pl.Trainer, settings: Settings, data: RandomData, known: bool) -> None:
        self._configured, self._settings, self._data, self._known = configured, settings, data, known
        self._stack = ExitStack()
        self._deployment: Deployment | None = None
        self._model_bytes = 0
        self.plan: RunPlan | None = None

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From here on, memory is planned for the machine of the run."""
        weights = tensor_bytes(pl_module.parameters())
        averaged = sum(weight_bytes(model) for model in compat.averaged_models(trainer))
        self._model_bytes = weight_bytes(pl_module) + weights + optimizer_bytes(trainer.optimizers) + averaged
        self._deployment = machine_of(self._configured, self._settings, self._model_bytes)
        self._stack.enter_context(planned_for(self._deployment))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All is known: the plan is made, before any other callback prunes."""
        self.plan = self._make(trainer, pl_module)
        raise PlannedError

    def _make(self, trainer: pl.Trainer, module: pl.LightningModule) -> RunPlan:
        machine, configured = self._deployment, self._configured
        assert machine is not None
        callbacks = [c for c in trainer.callbacks if isinstance(c, CAPPruningCallback)]  # type: ignore[attr-defined]
        for callback in callbacks:
            refuse_foreign_records(configured, callback.run.files)
        batch = next(iter(self._data.train_dataloader()))
        batch = to_device(trainer, module, batch)
        flops = layer_flops(module, self._data.one(batch)) if callbacks else {}
        calibration = calibration_of(trainer, module, batch)
        checkpoint, weights = checkpoint_bytes(trainer, module, callbacks), weight_bytes(module)
        files, plans = [], []
        for place, callback in enumerate(callbacks):
            plans += self._of_callback(place, callback, machine, calibration)
            name = goal_name(callback.pruner)
            files += cycle_files(callback, callback.run.events, checkpoint, weights, name, callback.run.targets)
        files += lightning_files(configured, checkpoint, weights)
        goals = callbacks[0].run.events if callbacks else {}
        starts = cycle_starts(trainer)
        images = self._data.images * machine.processes
        timeline = make_timeline(trainer, goals, starts, images, self._known)
        return RunPlan(
            command="fit",
            model=model_name(module),
            machine=MachinePlan(
                str(machine.device),
                machine.processes,
                machine.device_bytes,
                self._model_bytes,
                measured_on(module) if self._settings.measure else "",
            ),
            choices=tuple(choice_of(module, callback.run.targets, flops) for callback in callbacks),
            pruning=tuple(plans),
            timeline=timeline,
            folder=str(checkpoint_dir(configured, callbacks[0].dirpath if callbacks else None)),
            files=tuple(_merged(files)),
            notes=tuple(self._notes(callbacks)),
        )

    def _of_callback(
        self, place: int, callback: CAPPruningCallback, machine: Deployment, calibration: Calibration
    ) -> list[PruningPlan]:
        """One plan for each pruner that the run needs, each with the events that it does."""
        run, found = callback.run, []
        goals, pruner = dict(run.events), callback.pruner
        steps = list(
            steps_to_come(
                pruner,
                callback.schedule,
                run.targets,
                run.masks,
                goals.values(),
                callback.num_recomputations,
                callback.recomputation_path,
            )
        )
        for other in pruners_of(pruner, callback.schedule, goals):
            own = [
                (epoch, 0 if step is None else len(step.sparsities))
                for epoch, step in zip(goals, steps, strict=True)
                if (step is None and other is pruner) or (step is not None and type(step.pruner) is type(other))
            ]
            trial = run.trials.get(repr(other.statistic))
            source = whole_memory(trial, other.statistic, run.targets, self._data)
            memory = plan_record(other.plan(run.targets, run.masks, source=source))
            goal = max((goals[epoch] for epoch, _ in own if goals[epoch]), default=0.5)
            seconds = None
            if self._settings.measure:
                seconds = collection_seconds(other, run.targets, goal, memory, calibration, machine.processes, trial)
            cycles = _cycles(run.starts, goals, self._configured.max_epochs)
            each = event_seconds([count for _, count in own], seconds)
            events = [
                EventPlan(epoch, goals[epoch], count, cycles.get(epoch, 0), taken)
                for (epoch, count), taken in zip(own, each, strict=True)
            ]
            found.append(
                pruning_plan(other, run.targets, place, events, memory, seconds, list(dict.fromkeys(goals.values())))
            )
        return found

    def _notes(self, callbacks: list[CAPPruningCallback]) -> list[str]:
        notes = []
        if not self._known:
            images = self._data.images * max(1, self._configured.world_size)
            notes.append(
                f"{images} training samples are assumed, as the data is not looked at; else give --train_images"
            )
        if not callbacks:
            notes.append("no callback prunes: this run has no pruning events")
        if any(callback.schedule.adapts for callback in callbacks):
            notes.append("the schedule finds the sparsities in the weights, at each event; those told are the highest")
        mended = mending_notes([c.pruner for c in callbacks], any(c.recalibrate for c in callbacks))
        return notes + mended + memory_notes(self._deployment if callbacks else None)


def _cycles(starts: list[int], goals: dict[int, float], max_epochs: int | None) -> dict[int, int]:
    """Epochs from each event that begins a cycle to the next, or to the end."""
    end = max_epochs if max_epochs not in (None, -1) else max([*goals, 0]) + 1
    return {epoch: following - epoch for epoch, following in itertools.pairwise([*starts, end])}


def _merged(files: list[FilePlan]) -> list[FilePlan]:
    """Files of one name together."""
    found: dict[tuple[str, int], int] = {}
    for file in files:
        found[file.name, file.bytes] = found.get((file.name, file.bytes), 0) + file.count
    return [FilePlan(name, count, size) for (name, size), count in found.items()]
