"""What a run writes down of itself: ``run.jsonl``, and what its cycles end with in ``cycles.jsonl``."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_cap._version import __version__
from lightning_cap.callbacks.run import Run
from lightning_cap.callbacks.run_files import RunFiles
from lightning_cap.fisher.memory_plan import MemoryPlan
from lightning_cap.sparsity.flops import ModelFlops
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.run_records import (
    CYCLES,
    RUN,
    CycleRecord,
    LayerRecord,
    PlanRecord,
    RunRecord,
    less_is_better,
)
from lightning_cap.trainer.units import inner_model
from lightning_cap.utilities import distributed
from lightning_cap.utilities.compiled import plain_name
from lightning_cap.utilities.machine import this_machine
from lightning_cap.utilities.records import append_record, known_records, write_records

_log = logging.getLogger(__name__)


class RunLog:
    """Keeps ``run.jsonl`` and ``cycles.jsonl`` of a run. Rank 0 writes; every rank must call what is not said to be for one.

    Two callbacks of one run write to the same files: their records are told apart by what their goals count.
    """

    def __init__(self) -> None:
        self._files: RunFiles | None = None
        self._record: RunRecord | None = None

    def close(self) -> None:
        """Write nothing from now on. For any rank alone."""
        self._files = self._record = None

    def begin(self, files: RunFiles, record: RunRecord, history: Sequence[CycleRecord]) -> None:
        """Write that the run begins, and what is known of its cycles: a run that goes on may have lost the last lines.

        Args:
            files: Of the run.
            record: Of this start.
            history: Of its cycles.
        """
        self.close()
        with distributed.raise_on_all_ranks(f"Writing {RUN}"):
            if distributed.rank() == 0:
                self._files = files
                files.reserve()
                self._put(record)
        self.keep(history, record.metric)

    def keep(self, history: Sequence[CycleRecord], metric: str | None) -> None:
        """Write what the cycles ended with so far.

        The lines of this callback are those of ``history`` afterwards: what a run that was stopped did after the checkpoint
        that it goes on from is done again.

        Args:
            history: Of the cycles.
            metric: That the values in it are of; None if it is not known yet.
        """
        with distributed.raise_on_all_ranks(f"Writing {CYCLES}"):
            if self._files is not None and self._record is not None:
                known = known_records(self._files.cycles, CycleRecord)
                others = [line for line in known if _counted(line) != self._record.counted]
                if known != [*others, *history]:
                    write_records(self._files.cycles, [*others, *history])
                if metric is not None and metric != self._record.metric:
                    self._put(replace(self._record, metric=metric, mode=_mode(metric, self._record.mode)))

    def finish(self) -> None:
        """Write that the run came to its end."""
        with distributed.raise_on_all_ranks(f"Writing {RUN}"):
            self._end("finished")

    def stop(self) -> None:
        """Write that the run was stopped, if it has begun. For any rank alone; a failure is logged, as another one goes before."""
        try:
            self._end("stopped")
        except Exception:
            _log.warning("It could not be written down in %s that the run was stopped.", RUN, exc_info=True)

    def _end(self, state: str) -> None:
        if self._record is not None and not self._record.ended:
            self._put(replace(self._record, state=state, ended=now()))

    def _put(self, record: RunRecord) -> None:
        assert self._files is not None
        own = record.started, record.counted
        append_record(self._files.runs, record, lambda old: (old.started, old.counted) == own)
        self._record = record


def run_record(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    run: Run,
    flops: ModelFlops | None,
    counted: str,
    metric: str | None,
    mode: str | None,
    settings: Mapping[str, str],
) -> RunRecord:
    """The record of a run that begins now.

    Args:
        trainer: In ``fit``.
        module: Its LightningModule.
        run: Its targets, events and plans.
        flops: Of the model; None if they could not be counted.
        counted: What its goals count.
        metric: Of the table, if it is known.
        mode: Whether more or less of it is better; None to guess by the name of the metric.
        settings: Of the callback and the pruner.
    """
    _, inner = inner_model(module)
    architecture = getattr(getattr(inner, "pretrained_cfg", None), "architecture", None)
    return RunRecord(
        state="running",
        started=now(),
        epoch=trainer.current_epoch,
        max_epochs=-1 if trainer.max_epochs is None else trainer.max_epochs,
        schedule={str(epoch): goal for epoch, goal in run.events.items()},
        counted=counted,
        metric=metric,
        mode=mode or _mode(metric, "max"),
        model=architecture if isinstance(architecture, str) else type(inner).__name__,
        weights=sum(p.numel() for p in module.parameters() if not nn.parameter.is_lazy(p)),
        layers=_layers(module, run.targets, {} if flops is None else flops.layers),
        flops=None if flops is None else flops.total,
        plan=_plan(run.plans),
        settings=settings,
        environment=_environment(trainer, run.targets.device),
    )


def now() -> str:
    """The time in UTC, ISO 8601, to the microsecond."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def _mode(metric: str | None, otherwise: str) -> str:
    return "min" if metric is not None and less_is_better(metric) else otherwise


def _counted(line: CycleRecord) -> str:
    return "sparsity" if line.saving is None else line.saving.cost


def _layers(module: nn.Module, targets: Targets, flops: Mapping[str, int]) -> tuple[LayerRecord, ...]:
    """Targets, and what is left dense and why, in the order of the model."""
    layers = {plain_name(path): layer for path, layer in module.named_modules(remove_duplicate=False)}
    order = {plain_name(path): i for i, (path, _) in enumerate(module.named_parameters(remove_duplicate=False))}

    def shape(name: str) -> tuple[int, ...]:
        path, _, attribute = name.rpartition(".")
        with torch.no_grad():  # a weight that is no parameter is computed now
            return tuple(getattr(layers[path], attribute).shape)

    names = sorted((*targets, *targets.dense), key=lambda name: order.get(name, len(order)))
    return tuple(LayerRecord(name, shape(name), targets.dense.get(name, ""), flops.get(name)) for name in names)


def _plan(plans: Sequence[MemoryPlan]) -> PlanRecord | None:
    """That of the pruner that takes most."""
    if not plans:
        return None
    plan = max(plans, key=lambda one: one.peak_bytes)
    return PlanRecord(
        device=str(plan.device),
        peak_bytes=plan.peak_bytes,
        limit=plan.limit,
        storage_device=str(plan.storage_device),
        host_bytes=plan.host_bytes,
        passes=plan.passes,
        chunk=plan.chunk,
        rows=plan.rows,
    )


def _environment(trainer: pl.Trainer, device: torch.device) -> dict[str, str]:
    machine = this_machine(device)
    return {
        "lightning_cap": __version__,
        "torch": machine.torch,
        "lightning": pl.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": machine.name,
        "processor": machine.processor,
        "accelerator": machine.accelerator,
        "processes": str(distributed.world_size()),
        "threads": str(torch.get_num_threads()),
        "precision": str(trainer.precision),
    }
