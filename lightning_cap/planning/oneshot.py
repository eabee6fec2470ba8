"""The plan of a comparison, or of one-shot pruning: it is begun on random data, and stops before anything is collected."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_cap.calibration.sources import Trial
from lightning_cap.callbacks.checks import refuse_sharding
from lightning_cap.comparison.compare import check_validation
from lightning_cap.comparison.gradient_cache import place_of_rows
from lightning_cap.comparison.records import RESULTS
from lightning_cap.comparison.request import Request, make_request
from lightning_cap.comparison.runner import find_targets
from lightning_cap.comparison.variants import Variant, check_targets, naming
from lightning_cap.fisher.memory_plan import Deployment, planned_for
from lightning_cap.planning.choice import choice_of, layer_flops
from lightning_cap.planning.dry_run import (
    PlannedError,
    calibration_of,
    dry_trainer,
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
from lightning_cap.planning.files import tensor_bytes, weight_bytes
from lightning_cap.planning.machine import Settings, machine_of
from lightning_cap.planning.random_data import RandomData, random_data
from lightning_cap.planning.run_plan import EventPlan, FilePlan, MachinePlan, PruningPlan, RunPlan
from lightning_cap.planning.seconds import Calibration, collection_seconds, plan_record
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.calibration import to_device
from lightning_cap.trainer.event import PruningEvent

_RECORD = 3_000  # bytes of a record


def plan_oneshot(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: pl.LightningDataModule | None,
    settings: Settings | None = None,
    **given: Any,
) -> RunPlan:
    """What a comparison, or one-shot pruning, would do and cost, without its data.

    Args:
        trainer: As configured; on the CPU where its accelerator is not here (see `Settings`). It is not run.
        module: What is to be pruned; used up.
        data: Asked for nothing but its settings.
        settings: Of the plan.
        given: The arguments of `lightning_cap.comparison.compare` that follow, from ``pruners`` on, but ``ckpt_path``.

    Raises:
        CAPError: What the comparison would refuse, as far as no data is needed for it.
    """
    settings = Settings() if settings is None else settings
    refuse_sharding(trainer)
    check_validation(module, data)
    request = make_request(**given)
    noise, _ = random_data(module, data, max(1, trainer.world_size), settings.train_images)
    noise.tried = samples_to_try([variant.pruner for variant in request.variants], settings.measure)
    probe = _Probe(trainer, settings, noise, request)
    dry = dry_trainer(trainer, [probe])
    with quiet() as told, probe.stack:
        run_dry(lambda: dry.validate(module, datamodule=noise, verbose=False))
    assert probe.plan is not None
    return probe.plan.with_notes(told)


class _Probe(pl.Callback):
    """Does what a comparison does before it collects anything, and ends the run."""

    def __init__(self, configured: pl.Trainer, settings: Settings, data: RandomData, request: Request) -> None:
        self._configured, self._settings, self._data, self._request = configured, settings, data, request
        self.stack = ExitStack()
        self.plan: RunPlan | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All is known: the plan is made."""
        with torch.inference_mode(False), torch.enable_grad():
            self.plan = self._make(trainer, pl_module)
        raise PlannedError

    def _make(self, trainer: pl.Trainer, module: pl.LightningModule) -> RunPlan:
        request, model_bytes = self._request, weight_bytes(module)
        machine = machine_of(self._configured, self._settings, model_bytes)
        self.stack.enter_context(planned_for(machine))
        targets = find_targets(trainer, module, request)
        masks = MaskSet(targets)
        masks.mask_zeros()
        check_targets(request.variants, targets, masks, request.sparsities)
        batch = to_device(trainer, module, next(iter(self._data.train_dataloader())))
        flops = layer_flops(module, self._data.one(batch))
        work = _Work(trainer, module, request, targets, masks, machine, self._settings, self._data)
        plans = work.plans(calibration_of(trainer, module, batch))
        on = measured_on(module) if self._settings.measure else ""
        told = MachinePlan(str(machine.device), machine.processes, machine.device_bytes, model_bytes, on)
        return RunPlan(
            command="oneshot",
            model=model_name(module),
            machine=told,
            choices=(choice_of(module, targets, flops),),
            pruning=tuple(plans),
            folder="" if request.folder is None else str(request.folder),
            files=tuple(_files(request, targets, model_bytes)),
            notes=(
                *memory_notes(machine),
                *mending_notes([v.pruner for v in request.variants], any(v.recalibrate for v in request.variants)),
            ),
        )


class _Work:
    """The variants of a comparison, one plan for each label: seeds differ in nothing that it tells."""

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        request: Request,
        targets: Targets,
        masks: MaskSet,
        machine: Deployment,
        settings: Settings,
        data: RandomData,
    ) -> None:
        self._data = data
        self._trainer, self._module, self._request = trainer, module, request
        self._targets, self._masks, self._machine, self._settings = targets, masks, machine, settings
        self._trials: dict[str, Trial] = {}
        self._measured: dict[Any, dict[str, float]] = {}

    def plans(self, calibration: Calibration) -> list[PruningPlan]:
        """One for each pruner, and each value of the grids."""
        first = self._request.variants[0].seed
        variants = [variant for variant in self._request.variants if variant.seed == first]
        seeds = len({variant.seed for variant in self._request.variants})
        cached = self._cached(variants)
        return [replace(self._of(v, calibration, *cached.get(v.label, ("", 0, False))), seeds=seeds) for v in variants]

    def _cached(self, variants: Sequence[Variant]) -> dict[str, tuple[str, int, bool]]:
        """Where the rows of those are that share them, their bytes, and whether another collects them."""
        found: dict[str, tuple[str, int, bool]] = {}
        readers = [variant for variant in variants if variant.gradients is not None]
        for per_sample in dict.fromkeys(v.gradients.per_sample for v in readers if v.gradients is not None):
            group = [v for v in readers if v.gradients is not None and v.gradients.per_sample == per_sample]
            largest = max(group, key=lambda v: v.gradients.n if v.gradients is not None else 0)
            if len(group) < 2 or largest.gradients is None:
                continue
            size = -(-largest.gradients.n // self._machine.processes) * 4 * self._targets.numel
            place = place_of_rows(size, self._machine.host_bytes, self._free_on_disk(), self._request.max_rows_memory)
            found |= {
                v.label: (place, size if v is largest and place else 0, bool(place) and v is not largest) for v in group
            }
        return found

    def _free_on_disk(self) -> int | None:
        folder = self._request.folder
        if folder is None:
            return None
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        return shutil.disk_usage(there).free

    def _of(self, variant: Variant, calibration: Calibration, place: str, size: int, reads: bool) -> PruningPlan:
        pruner, targets = variant.pruner, self._targets
        event = PruningEvent(
            self._trainer, self._module, pruner, targets, self._masks, variant.seed, None, self._trials
        )
        key = repr(pruner.statistic)
        with naming(variant):
            if pruner.statistic is not None and key not in self._trials:
                event.dry_run(0)
            trial = self._trials.get(key)
            source = whole_memory(trial, pruner.statistic, targets, self._data)
            memory = plan_record(pruner.plan(targets, self._masks, source=source))
        seconds = self._seconds(variant, memory, calibration, trial)
        if reads and seconds is not None:
            seconds = {**seconds, "collect": 0.0}
        steps, events = variant.num_recomputations, []
        for number, goal in enumerate(self._request.sparsities):
            count = steps if steps > 1 else int(number == 0)
            each = None if seconds is None else count * sum(seconds.values()) if count else seconds["apply"]
            events.append(EventPlan(None, goal, count, 0, each))
        goals = list(self._request.sparsities)
        plan = pruning_plan(pruner, targets, 0, events, memory, seconds, goals, variant.label)
        return replace(plan, cached=place, cached_bytes=size)

    def _seconds(
        self, variant: Variant, memory: Any, calibration: Calibration, trial: Trial | None
    ) -> Mapping[str, float] | None:
        """Measured once for all variants that differ in no whole number."""
        if not self._settings.measure:
            return None
        pruner = variant.pruner
        own = {name: value for name, value in vars(pruner).items() if isinstance(value, int) and name != "seed"}
        key = type(pruner), repr(sorted(own.items())), repr(pruner.pattern)
        if key not in self._measured:
            goal = max(self._request.sparsities)
            self._measured[key] = collection_seconds(
                pruner, self._targets, goal, memory, calibration, self._machine.processes, trial
            )
        return self._measured[key]


def _files(request: Request, targets: Targets, weights: int) -> list[FilePlan]:
    if request.folder is None:
        return []
    records = len(request.variants) * len(request.sparsities)
    found = [FilePlan(RESULTS, 1, _RECORD * (records + 1))]
    for sparsity in request.sparsities:
        kept = int((1 - sparsity) * tensor_bytes(targets.values())) if request.keeps_values else 0
        found.append(FilePlan(f"masks/*{sparsity:.2f}.safetensors", len(request.variants), kept + targets.numel // 8))
    written = sum(bool(request.weights_file(v, s)) for v in request.variants for s in request.sparsities)
    return [*found, *([FilePlan("pruned weights (*.safetensors)", written, weights)] if written else [])]
