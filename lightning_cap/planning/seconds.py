"""Seconds of the phases of an event, from about one second of its work on this machine."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_cap.calibration.batches import batch_size, slice_batch
from lightning_cap.calibration.gradients import rows_at_once
from lightning_cap.calibration.sources import TimedSource, Trial, limit_rows
from lightning_cap.calibration.statistics import Collector, GradientSamples, LayerInputs, Statistic
from lightning_cap.fisher.memory_plan import MemoryPlan
from lightning_cap.pruners.base import Pruner
from lightning_cap.sparsity.allocation import Global
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.run_records import PlanRecord

_COLLECTING, _SOLVING = 0.5, 0.4  # seconds that each is measured for
_ROWS = 512  # random gradient rows, at the most: enough for sound blocks
_FIRST_WEIGHTS, _MOST_WEIGHTS = 2**13, 2**20  # of the targets that are solved
_PARTS = 4  # targets that these are of
_FEW = 4  # samples in a gradient, where it has many


@dataclass(frozen=True)
class Calibration:
    """What an event reads with, inside a run.

    Attributes:
        module: Whose weights are pruned.
        loss: Of a batch.
        batch: One batch of the run, on its device.
        inside: Entered around all reading.
        context: Entered around every loss.
        scale: Of the loss.
    """

    module: torch.nn.Module
    loss: Any
    batch: Any
    inside: Any = nullcontext
    context: Any = nullcontext
    scale: float = 1.0

    def collector(self, statistic: Statistic, targets: Targets, samples: int, trial: Trial | None = None) -> Collector:
        """Of so many samples of the batch."""
        some = slice_batch(self.batch, batch_size(self.batch), 0, samples)
        return statistic.collector(
            self.module, targets, self.loss, [some], context=self.context, scale=self.scale, trial=trial
        )

    def reading(self) -> AbstractContextManager[Any]:
        """Around all reading."""
        return self.inside()  # type: ignore[no-any-return]


def collection_seconds(
    pruner: Pruner,
    targets: Targets,
    goal: float,
    plan: PlanRecord,
    calibration: Calibration,
    processes: int,
    trial: Trial | None,
) -> dict[str, float]:
    """Seconds of one collection and what follows it, of each phase.

    Args:
        pruner: Of the run.
        targets: What it prunes.
        goal: To solve for.
        plan: Of the memory.
        calibration: What an event reads with.
        processes: That share the work, each as quick as this one.
        trial: What was found out about the statistic.
    """
    statistic = pruner.statistic
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        if pruner.takes_units:
            return _of_units(pruner, targets, goal, calibration, processes)
        collect, chunk = 0.0, None
        if statistic is not None:
            each, chunk = _of_a_sample(statistic, targets, calibration, trial, plan.rows)
            reads = plan.passes * (2 if plan.passes > 1 else 1)
            collect = each * statistic.num_samples / processes * reads
        solve, apply = _of_solving(pruner, targets, goal, chunk)
    return {"collect": collect, "solve": solve / processes, "apply": apply / processes}


def _of_a_sample(
    statistic: Statistic, targets: Targets, calibration: Calibration, trial: Trial | None, rows: int | None
) -> tuple[float, Any]:
    """Seconds of one sample, and the last chunk that was read."""
    if isinstance(statistic, GradientSamples) and statistic.per_sample > _FEW:
        statistic = replace(statistic, n=1, per_sample=_FEW)
    per_row = statistic.per_sample if isinstance(statistic, GradientSamples) else 1
    available = batch_size(calibration.batch)
    samples = min(per_row, available)
    seconds, chunk = _read(statistic, targets, calibration, samples, trial, rows)
    most = max(samples, min(available, per_row * (rows or rows_at_once(targets))))
    while samples < most and 4 * seconds < 2 * _COLLECTING:
        samples = min(most, 4 * samples)
        seconds, chunk = _read(statistic, targets, calibration, samples, trial, rows)
    return seconds / samples, chunk


def _read(
    statistic: Statistic,
    targets: Targets,
    calibration: Calibration,
    samples: int,
    trial: Trial | None,
    rows: int | None,
) -> tuple[float, Any]:
    with calibration.reading():
        collector = calibration.collector(statistic, targets, samples, trial)
        collector.memory()  # tried before the clock starts
        limit_rows(collector, rows)
        watch, last = _Watch(), None
        for chunk in collector:
            last = chunk
        _wait(targets)
        return watch.seconds, last


def _of_solving(pruner: Pruner, targets: Targets, goal: float, chunk: Any) -> tuple[float, float]:
    """Seconds of ordering all weights, and of building the new ones."""
    pruner = copy.copy(pruner)
    pruner.allocation = Global()  # that of the run may be of its targets alone
    few = _part(targets, _FIRST_WEIGHTS)
    _solve(pruner, few, goal, chunk)  # compiles
    solve, apply = _solve(pruner, few, goal, chunk)
    wanted = min(_MOST_WEIGHTS, int(few.numel * _SOLVING / max(solve + apply, 1e-6)))
    if wanted > 2 * few.numel:
        few = _part(targets, wanted)
        solve, apply = _solve(pruner, few, goal, chunk)
    scale = targets.numel / few.numel
    return solve * scale, apply * scale


def _part(targets: Targets, weights: int) -> Targets:
    """The first rows of some of the targets, about so many weights."""
    names = list(targets)
    chosen = names if len(names) <= _PARTS else names[:: len(names) // _PARTS][:_PARTS]
    found = {}
    for name in chosen:
        weight = targets[name].detach()
        rows = math.ceil(weights / len(chosen) / max(1, weight[0].numel()) / 8) * 8
        found[name] = weight[: min(rows, len(weight))].clone()
    return Targets(found)


def _solve(pruner: Pruner, targets: Targets, goal: float, chunk: Any) -> tuple[float, float]:
    """Seconds of `Pruner.path` and of `PruningPath.at`, as if all rows had been read."""
    source = _Rows(pruner.statistic, targets, chunk)
    watch = _Watch()
    with torch.inference_mode(False), pruner.path(targets, source, None) as path:
        _wait(targets)
        solving = max(0.0, watch.seconds - source.taken_in - source.made)
        watch = _Watch()
        path.at(goal)
        _wait(targets)
        return solving + source.taken_in * source.share, watch.seconds


class _Rows:
    """What a statistic gives, of some targets: random gradient rows, or the layer inputs of a chunk.

    Attributes:
        made: Seconds that making rows took.
        taken_in: Seconds that the reader took between them.
        share: All rows that an event has, over those that are given.
    """

    repeatable = True

    def __init__(self, statistic: Statistic | None, targets: Targets, chunk: Any) -> None:
        self._targets, self._chunk = targets, chunk
        self._inputs = isinstance(statistic, LayerInputs)
        self._count = 0
        if statistic is not None:
            n = getattr(statistic, "n", statistic.num_samples)
            self._count = min(int(n), _ROWS)
        self.made = self.taken_in = 0.0
        self.share = (
            1.0 if not self._count or self._inputs else float(getattr(statistic, "n", self._count)) / self._count
        )

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        left = 1 if self._inputs else self._count
        while left > 0:
            watch = _Watch()
            rows = min(left, 32)
            left -= rows
            chunk = self._chunk if self._inputs else self._random(rows)
            self.made += watch.seconds
            watch = _Watch()
            yield chunk
            self.taken_in += watch.seconds

    def _random(self, rows: int) -> dict[str, Tensor]:
        return {n: torch.randn(rows, *w.shape, device=w.device) for n, w in self._targets.items()}


def _of_units(
    pruner: Pruner, targets: Targets, goal: float, calibration: Calibration, processes: int
) -> dict[str, float]:
    """A whole event on few samples: what is read takes as much longer as there are more."""
    statistic, available = pruner.statistic, batch_size(calibration.batch)
    samples = min(available, _FEW)
    source = TimedSource(())
    with calibration.reading():
        if statistic is not None:
            collector = calibration.collector(statistic, targets, samples)
            collector.memory()
            source = TimedSource(collector)
        watch, started = _Watch(), time.perf_counter()
        with torch.inference_mode(False), pruner.path(targets, source, None) as path:
            _wait(targets)
            solving, before = time.perf_counter() - started - source.seconds, source.seconds
            started = time.perf_counter()
            path.at(goal)
            _wait(targets)
            applying = time.perf_counter() - started - (source.seconds - before)
    own = watch.seconds / max(1e-9, solving + applying + source.seconds)  # the rest was other programs'
    share = 0.0 if statistic is None else statistic.num_samples / samples / processes
    return {
        "collect": own * source.seconds * share,
        "solve": own * max(0.0, solving),
        "apply": own * max(0.0, applying),
    }


class _Watch:
    """Seconds since it was made, of this process alone: other programs on the CPU do not count."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> float:
        """By the clock, but no more than the threads of this process were at work together."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return wall if torch.cuda.is_available() else min(wall, cpu)


def _wait(targets: Targets) -> None:
    if targets.device.type == "cuda":
        torch.cuda.synchronize(targets.device)


def plan_record(plan: MemoryPlan) -> PlanRecord:
    """A memory plan, as it is recorded."""
    return PlanRecord(
        str(plan.device),
        plan.peak_bytes,
        plan.limit,
        str(plan.storage_device),
        plan.host_bytes,
        plan.passes,
        plan.chunk,
        plan.rows,
    )


def event_seconds(collections: Sequence[int], seconds: Mapping[str, float] | None) -> list[float | None]:
    """Of each event, by how often it collects."""
    if seconds is None:
        return [None] * len(collections)
    return [count * sum(seconds.values()) for count in collections]
