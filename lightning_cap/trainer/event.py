"""One pruning event inside a Lightning run: plan, collect, solve, apply. All of it happens, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource, TimedSource, Trial
from lightning_cap.calibration.statistics import Collector, Statistic
from lightning_cap.errors import GradientError
from lightning_cap.fisher.memory_plan import MemoryPlan
from lightning_cap.healing.parts import ModelParts
from lightning_cap.pruners.base import Pruner, heal_of, prepare
from lightning_cap.pruners.paths import PruneResult, PruningPath
from lightning_cap.quantization.layers import plain_linears
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.calibration import (
    calibrating,
    calibration_batches,
    calibration_loss,
    calibration_source,
    loss_scale,
    precision_context,
)
from lightning_cap.trainer.divergence import refuse_broken_loss, refuse_broken_weights
from lightning_cap.trainer.mending import module_mender
from lightning_cap.trainer.saliency import SAMPLE, ScoreHistogram, histogram
from lightning_cap.utilities import distributed
from lightning_cap.utilities.distributed import check_equal_on_all_ranks
from lightning_cap.utilities.peak_memory import watch_peak
from lightning_cap.utilities.progress import Progress


@dataclass
class EventReport:
    """What an event did, for logs.

    Attributes:
        sparsity: Of all targets, after the event.
        predicted_loss: Predicted increase of the loss, summed over recomputations; None where the pruner predicts none.
        unit: What was collected, such as ``"gradients"`` or ``"inputs"``.
        samples: How many of them were used, in all.
        skipped: How many were left out as not finite.
        healed: Samples that healing has read.
        recalibrated: Samples that batch norm was estimated from.
        seconds: Seconds of each phase (plan, collect, solve, apply; heal and recalibrate, where there were any).
        grown: Weights that grew back.
        peak_bytes: Planned peak extra memory on the device of the weights.
        measured_bytes: Peak extra memory there, measured, of the process that took most; see `watch_peak`. None if it cannot be.
        stats: The pruner's own numbers, of the last recomputation.
        saliency: What the weights were ranked by in it; None where they were not.
    """

    sparsity: float = 0.0
    predicted_loss: float | None = None
    unit: str = "gradients"
    samples: int = 0
    skipped: int = 0
    healed: int = 0
    recalibrated: int = 0
    grown: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("plan", "collect", "solve", "apply"), 0.0))
    peak_bytes: int = 0
    measured_bytes: int | None = None
    stats: Mapping[str, float] = field(default_factory=dict)
    saliency: ScoreHistogram | None = None


class PruningEvent:
    """Prunes the module of a running Trainer.

    Args:
        trainer: In ``fit`` (or, for a comparison, in ``validate``).
        module: Its LightningModule.
        pruner: The method.
        targets: The weights.
        masks: Weights that are pruned already; updated by `run`.
        seed: First part of the key that samples and augmentation are drawn by.
        progress: ``progress(phase, done, total)``.
        trials: What a dry run has found out about each statistic, by its ``repr``; filled in. Default: nothing.
        recalibrate: Estimate the statistics of batch norm anew in the end.

    Attributes:
        report: What it did.
        grown: ``{target: bool (*shape)}``, True where a masked weight grew back.
        mender: What heals and recalibrates.

    Raises:
        ConfigError: The pruner cannot be healed as it says.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        pruner: Pruner,
        targets: Targets,
        masks: MaskSet,
        seed: int,
        progress: Progress | None = None,
        trials: dict[str, Trial] | None = None,
        recalibrate: bool = False,
    ) -> None:
        self._trainer, self._module, self._pruner = trainer, module, pruner
        self._targets, self._masks, self._seed, self._progress = targets, masks, seed, progress
        self._source = TimedSource(())
        self._trials = {} if trials is None else trials
        self.report = EventReport(unit="gradients" if pruner.statistic is None else pruner.statistic.unit)
        self.grown: dict[str, Tensor] = {}
        heal = heal_of(pruner)
        self._calibrates = pruner.statistic is not None or heal is not None or recalibrate
        self._recalibrate = recalibrate
        self._parts = ModelParts(module, targets, heals=[heal], statistics=recalibrate)
        self.mender = module_mender(trainer, module, targets, heal, seed, progress)

    def run(self, sparsities: Sequence[float], collection_index: int) -> int:
        """Prune to each sparsity in turn, with fresh gradients each time, and apply the result.

        Args:
            sparsities: One for each recomputation, rising unless the pruner regrows. None at all unmasks every weight.
            collection_index: How many collections the run has made before.

        Returns:
            The collection index afterwards.

        Raises:
            CAPError: Whatever went wrong; the model and the masks are then as before.
        """
        peak = watch_peak(self._targets.device)
        before = self._parts.copies()
        masks, saliency = dict(self._masks), 0.0
        try:
            with distributed.fail_together("The pruning event"), plain_linears(self._module):
                refuse_broken_weights(self._trainer, self._targets)
                for sparsity in sparsities:
                    result = self._prune(sparsity, collection_index, masks, before)
                    masks = dict(result.masks)
                    saliency += result.saliency
                    self.report.stats = {**result.stats, **self.mender.stats}
                    collection_index += 1
                if self._recalibrate and sparsities:
                    self.mender.recalibrate(collection_index - 1)
                    check_equal_on_all_ranks({"weights and statistics": self._parts.tensors()})
                self._put(masks, lifted=not sparsities)
        except BaseException:
            self._parts.restore(before)
            raise
        self.report.healed, self.report.recalibrated = self.mender.healed, self.mender.recalibrated
        self.report.seconds |= self.mender.seconds
        peaks = distributed.gather_objects(peak())
        self.report.measured_bytes = None if None in peaks else max(peaks)
        self.report.sparsity = self._masks.global_sparsity
        self.report.predicted_loss = saliency if sparsities and self._pruner.predicts_loss else None
        self.report.grown = sum(int(back.sum()) for back in self.grown.values())
        return collection_index

    def _refuse_broken_loss(self, collection_index: int) -> None:
        if self._pruner.statistic is not None and not self._targets.is_sharded:  # ranks must do equally many passes
            first = next(self._batches(self._pruner.statistic, collection_index), None)
            if first is not None:
                refuse_broken_loss(self._trainer, self._module, calibration_loss(self._module), first)

    def _put(self, masks: Mapping[str, Tensor], lifted: bool) -> None:
        if lifted:
            self.grown = self._masks.unmask_all()
        elif self._pruner.regrows:
            self.grown = self._masks.replace(masks)
        else:
            self._masks.update(masks)

    @distributed.fail_together("The pruning event")
    def path(
        self, collection_index: int, masks: Mapping[str, Tensor], rows: GradientSource | None = None
    ) -> PruningPath:
        """Collect gradients and solve; the caller closes the path. Nothing in the module changes.

        Args:
            collection_index: See `run`.
            masks: Weights that are pruned already.
            rows: Read these instead of collecting, such as rows that several pruners share.
        """
        started = time.perf_counter()
        collector = self.collector(collection_index) if rows is None else None
        source = collector if rows is None else rows
        with self._calibrating() if rows is None else nullcontext():
            self.report.peak_bytes = self._plan(source, masks).peak_bytes
        self.report.seconds["plan"] += time.perf_counter() - started
        context = self._calibrating if rows is None else nullcontext
        self._source = TimedSource(source if source is not None else (), context)
        with self._timed("solve"), torch.inference_mode(False), self._explaining(collection_index):
            path = self._pruner.path(self._targets, self._source, masks, progress=self._progress)
        if collector is not None:
            self.report.samples += collector.collected
            self.report.skipped += collector.skipped
        return path

    @contextmanager
    def _explaining(self, collection_index: int) -> Iterator[None]:
        """Gradients that cannot be used are told as a broken loss, if that is why."""
        try:
            yield
        except GradientError:
            with self._calibrating():
                self._refuse_broken_loss(collection_index)
            raise

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Add the body's time to a phase, less what it spends on reading gradients, which is collection."""
        started, before = time.perf_counter(), self._source.seconds
        yield
        if self._targets.device.type == "cuda":
            torch.cuda.synchronize(self._targets.device)
        collecting = self._source.seconds - before
        self.report.seconds["collect"] += collecting
        self.report.seconds[phase] += time.perf_counter() - started - collecting

    def dry_run(self, collection_index: int) -> MemoryPlan:
        """Compute a few gradients that are thrown away, and plan: what cannot work is to fail before training begins."""
        with distributed.fail_together("The plan of the pruning events"), self._calibrating():
            refuse_broken_weights(self._trainer, self._targets)
            if self._calibrates:
                calibration_source(self._trainer, self._module)  # refused before training begins
            with distributed.raise_on_all_ranks("The first loss"):
                self._refuse_broken_loss(collection_index)
            plan = self._plan(self.collector(collection_index), self._masks)
        rank_zero_info(f"Pruning events: {plan}")
        return plan

    def collector(self, collection_index: int) -> Collector | None:
        """The source of what the pruner reads, at a collection index; None if that is nothing."""
        statistic = self._pruner.statistic
        if statistic is None:
            return None
        return statistic.collector(
            self._module,
            self._targets,
            calibration_loss(self._module),
            _Repeat(lambda: self._batches(statistic, collection_index)),
            context=precision_context(self._trainer),
            scale=loss_scale(self._trainer),
            progress=self._progress,
            trial=self._trials.get(repr(statistic)),
        )

    def _batches(self, statistic: Statistic, collection_index: int) -> Iterator[Any]:
        key = self._seed, collection_index
        return calibration_batches(self._trainer, self._module, statistic, self._targets, key)

    def _calibrating(self) -> AbstractContextManager[None]:
        return calibrating(self._trainer, self._module)

    def _plan(self, source: GradientSource | None, masks: Mapping[str, Tensor]) -> MemoryPlan:
        plan = prepare(self._pruner, self._targets, masks, source)
        trial = getattr(source, "trial", None)
        if trial is not None:
            self._trials[repr(self._pruner.statistic)] = trial
        return plan

    def _prune(
        self, sparsity: float, collection_index: int, masks: Mapping[str, Tensor], dense: Mapping[str, Tensor]
    ) -> PruneResult:
        with self.path(collection_index, masks) as path, self._timed("apply"), torch.inference_mode(False):
            result = self.mender.choose(path.candidates(sparsity), collection_index)
            self.report.saliency = histogram(path.scores(SAMPLE))
        started = time.perf_counter()
        result.apply(self._targets)
        if not self._targets.is_sharded:  # else no two processes have the same
            check_equal_on_all_ranks({"the weights": self._targets.weights(), "the masks": result.masks})
        self.report.seconds["apply"] += time.perf_counter() - started
        if self.mender.heal(result.masks, dense, collection_index):
            check_equal_on_all_ranks({"the healed weights": self._parts.tensors()})
        return result


class _Repeat:
    """Makes a function that gives an iterator re-iterable."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return self._make()
