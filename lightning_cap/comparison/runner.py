"""The work of a comparison inside one validation run: collect, solve, apply, measure, put the weights back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_cap.calibration.sources import TimedSource, Trial
from lightning_cap.comparison.artifacts import Artifacts
from lightning_cap.comparison.fingerprint import basis_of
from lightning_cap.comparison.fisher_block import check_block_size
from lightning_cap.comparison.gradient_cache import SharedRows, find, share
from lightning_cap.comparison.measure import loss_name
from lightning_cap.comparison.recorder import Recorder
from lightning_cap.comparison.records import ComparisonRecord
from lightning_cap.comparison.request import Request
from lightning_cap.comparison.solutions import Solutions
from lightning_cap.comparison.variants import Variant, check_targets, naming
from lightning_cap.errors import ConfigError, DataError
from lightning_cap.healing.parts import ModelParts
from lightning_cap.pruners.base import heal_of
from lightning_cap.pruners.paths import PruneResult
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.calibration import calibrating
from lightning_cap.trainer.ends import find_module_ends
from lightning_cap.trainer.evaluation import evaluate
from lightning_cap.trainer.event import PruningEvent
from lightning_cap.trainer.mending import note_missing_batch_norm
from lightning_cap.trainer.progress_bar import event_progress
from lightning_cap.trainer.units import find_module_units, prepare_cost
from lightning_cap.utilities import distributed, rng
from lightning_cap.utilities.progress import Progress

_WORK = ".work"  # folder in the folder, gone in the end


class ComparisonRunner:
    """All runs of a comparison, in the module of a Trainer that validates.

    Args:
        trainer: In ``validate``.
        module: Its LightningModule; as before afterwards.
        request: What to compare.

    Raises:
        CAPError: A pruner refuses the targets, or its allocation a sparsity.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, request: Request) -> None:
        self._trainer, self._module, self._request = trainer, module, request
        self._targets = find_targets(trainer, module, request)
        self._masks = MaskSet(self._targets)
        self._masks.mask_zeros()
        check_targets(request.variants, self._targets, self._masks, request.sparsities)
        heals = [heal_of(variant.pruner) for variant in request.variants]
        recalibrates = any(variant.recalibrate for variant in request.variants)
        note_missing_batch_norm(module, recalibrates)
        self._parts = ModelParts(module, self._targets, heals=heals, statistics=recalibrates)
        self._before = self._parts.copies()
        calibrates = any(variant.calibrates for variant in request.variants)
        self._basis = basis_of(trainer, module, self._targets, calibrates)
        if request.fisher_block:
            check_block_size(self._targets, request.fisher_block)
        self._recorder = Recorder(trainer, module, request, self._targets, self._parts, self._before, self._basis)
        self._solutions = Solutions(request.folder, self._before)
        wanted = [(v, s) for v in request.variants for s in request.sparsities]
        fingerprints = {(v.slug, s): self._recorder.fingerprint(v, s) for v, s in wanted}
        self._artifacts = Artifacts(request, self._targets, distributed.gather_objects(fingerprints)[0])
        self._todo: dict[Variant, list[float]] = {}
        self._trials: dict[str, Trial] = {}
        self._started = 0

    def run(self) -> list[ComparisonRecord]:
        """Do what is missing; the records in the order of the request, the unpruned model's first."""
        try:
            mends = self._sort()
            self._dry_run()
            self._recorder.store.discard_stale()
            self._recorder.measure_unpruned({v.seed for v in (*self._todo, *(v for v, _ in mends))})
            self._mend(mends)
            for seed in dict.fromkeys(v.seed for v in self._request.variants):
                self._run_seed(seed)
            self._draw_surface()
        finally:
            self._parts.restore(self._before)
        self._recorder.store.discard_stale()
        self._recorder.store.save()
        if self._request.folder is not None and distributed.gather_objects(None):  # when all have come here
            shutil.rmtree(self._request.folder / _WORK, ignore_errors=True)
        return self._recorder.store.records()

    def _sort(self) -> list[tuple[Variant, ComparisonRecord]]:
        """Take note of what is to be solved, and return the records that only lack something that their weights tell."""
        mends = []
        for variant in self._request.variants:
            for goal in self._request.sparsities:
                record = self._recorder.known(variant, goal)
                if record is not None:
                    whole = self._recorder.is_whole(variant, record)
                    needed = not whole or self._artifacts.needs(variant, goal)
                    if not needed or self._solutions.load(record) is not None:
                        mends += [] if whole else [(variant, record)]
                        continue
                self._todo.setdefault(variant, []).append(goal)
        return mends

    def _mend(self, mends: Sequence[tuple[Variant, ComparisonRecord]]) -> None:
        """Put the weights of records into the model again, and measure what is missing."""
        with event_progress(self._trainer, "Losses of earlier records") as progress:
            for number, (variant, record) in enumerate(mends):
                progress("measure", number, len(mends))
                try:
                    self._parts.restore(self._weights_of(record))
                    self._recorder.mend(variant, record)
                finally:
                    self._parts.restore(self._before)

    def _weights_of(self, record: ComparisonRecord | None) -> dict[str, Tensor]:
        weights = self._solutions.load(record) if record is not None else None
        if record is None or weights is None:
            raise DataError("masks: files were removed or changed while the comparison ran. Start it again.")
        return weights

    def _draw_surface(self) -> None:
        if not self._artifacts.surface_wanted:
            return
        with event_progress(self._trainer, "Loss surface") as progress:
            self._artifacts.save_surface(
                self._parts,
                lambda variant, goal: self._weights_of(self._recorder.known(variant, goal)),
                self._surface_loss(),
                lambda done, total: progress("loss", done, total),
            )

    def _dry_run(self) -> None:
        """Compute one batch for each kind of source, and throw it away: what cannot work is to fail before anything runs."""
        kinds = {_kind(v): v for v in self._todo if v.calibrates}
        for variant in kinds.values():
            with naming(variant):
                self._event(variant).dry_run(0)

    def _run_seed(self, seed: int) -> None:
        """Pruners without gradients first, then those that read the same rows together."""
        here = [variant for variant in self._todo if variant.seed == seed]
        block = self._artifacts.block_reader(seed)
        readers = [variant for variant in here if variant.gradients is not None] + (
            [block] if block is not None else []
        )
        self._run([variant for variant in here if variant.gradients is None], None)
        for kind in dict.fromkeys(map(_kind, readers)):
            group = [variant for variant in readers if _kind(variant) == kind]
            rows = self._shared(group)
            if block is not None and block in group:
                self._artifacts.save_block(_first(rows, block) or self._own_rows(block))
            self._run([variant for variant in here if variant in group], rows)
            if rows is not None:
                rows.chunks.close()

    def _own_rows(self, variant: Variant, progress: Progress | None = None) -> TimedSource:
        source = self._event(variant, progress).collector(0)
        return TimedSource(source if source is not None else (), lambda: calibrating(self._trainer, self._module))

    def _shared(self, readers: Sequence[Variant]) -> SharedRows | None:
        """The rows for pruners of one seed and ``samples_per_gradient``, if there is more than one."""
        request, wanted = self._request, {v: v.gradients for v in readers if v.gradients is not None}
        largest = max(wanted, key=lambda v: wanted[v].n)
        m, most = wanted[largest].per_sample, wanted[largest].n
        folder = None if request.folder is None else request.folder / _WORK / f"rows-seed={largest.seed}-m={m}"
        key = f"{self._basis.model} {self._basis.calibration} {largest.seed} {m}"
        found = find(self._targets, most, folder, key)
        if found is not None or len(readers) < 2:
            return found
        with event_progress(self._trainer, "Gradients for all") as progress:
            source = self._own_rows(largest, progress)
            return share(source, self._targets, most, folder, key, request.max_rows_memory)

    def _run(self, variants: Sequence[Variant], rows: SharedRows | None) -> None:
        for variant in variants:
            self._started += 1
            seed = f", seed {variant.seed}" if len({v.seed for v in self._request.variants}) > 1 else ""
            title = f"{self._started}/{len(self._todo)} {variant.label}{seed}"
            with event_progress(self._trainer, title) as progress:
                if variant.num_recomputations == 1:
                    self._from_one_path(variant, _first(rows, variant), progress)
                    continue
                for number, sparsity in enumerate(self._todo[variant]):
                    progress("sparsity", number, len(self._todo[variant]))
                    self._in_steps(variant, sparsity, _first(rows, variant), progress)

    def _from_one_path(self, variant: Variant, rows: SharedRows | None, progress: Progress) -> None:
        event = self._event(variant, progress)
        with _drawing(variant):
            path = event.path(0, self._masks, rows)
        with path:
            solved = _seconds(event, rows)
            for number, sparsity in enumerate(self._todo[variant]):
                progress("validate", number, len(self._todo[variant]))
                started = time.perf_counter()
                event.mender.seconds.clear()
                with _drawing(variant):
                    result = event.mender.choose(path.candidates(sparsity), 0)
                seconds = {**solved, "apply": time.perf_counter() - started}
                try:
                    self._apply(event, result, 0)
                    self._record(variant, sparsity, event, result, result.saliency, seconds)
                finally:
                    self._parts.restore(self._before)

    def _in_steps(self, variant: Variant, sparsity: float, rows: SharedRows | None, progress: Progress) -> None:
        """Rising sparsities with fresh gradients for each; the first step is at the dense model and shares its rows."""
        start = variant.pruner.reached(self._targets, self._masks)
        goals = variant.steps_to(sparsity, start)
        masks: Mapping[str, Tensor] = self._masks
        saliency, seconds = 0.0, {"collect": 0.0, "solve": 0.0, "apply": 0.0}
        try:
            for step, goal in enumerate(goals):
                event = self._event(variant, progress)
                own = rows if step == 0 else None
                with _drawing(variant), event.path(step, masks, own) as path:
                    started = time.perf_counter()
                    result = event.mender.choose(path.candidates(goal), step)
                    taken = {**_seconds(event, own), "apply": time.perf_counter() - started}
                self._apply(event, result, step)
                masks, saliency = result.masks, saliency + result.saliency
                seconds = _added(seconds, {**taken, **event.mender.seconds})
            event.mender.seconds.clear()
            self._record(variant, sparsity, event, result, saliency, seconds)
        finally:
            self._parts.restore(self._before)

    def _apply(self, event: PruningEvent, result: PruneResult, step: int) -> None:
        """Write the weights of a result into the model, and heal it."""
        result.apply(self._targets)
        event.mender.heal(result.masks, self._before, step)

    def _record(
        self,
        variant: Variant,
        sparsity: float,
        event: PruningEvent,
        result: PruneResult,
        saliency: float,
        seconds: dict[str, float],
    ) -> None:
        """Recalibrate the model, which has the weights of a result; measure it, keep the record and its files."""
        if variant.recalibrate:
            event.mender.recalibrate(variant.num_recomputations - 1)
        keep = self._request.keeps_values or self._artifacts.needs(variant, sparsity)
        result = replace(result, stats={**result.stats, **event.mender.stats})
        self._recorder.add(variant, sparsity, result, saliency, _added(seconds, event.mender.seconds), keep)

    def _event(self, variant: Variant, progress: Progress | None = None) -> PruningEvent:
        args = self._trainer, self._module, variant.pruner, self._targets, self._masks, variant.seed
        return PruningEvent(*args, progress, self._trials, variant.recalibrate)

    def _surface_loss(self) -> Callable[[], float]:
        """The validation loss, of as many batches as the surface wants."""
        metrics = self._recorder.unpruned.metrics
        name = loss_name(metrics)
        batches = self._request.surface.batches if self._request.surface is not None else None
        if name is None:
            raise ConfigError(
                f"surface: the module logs no loss in validation, but only {list(metrics)}. Log one, with 'loss' in its name."
            )
        return lambda: evaluate(self._trainer, self._module, batches)[name]


def find_targets(trainer: pl.Trainer, module: pl.LightningModule, request: Request) -> Targets:
    """Weights, or where any pruner takes units, all weights of units, for the others too. Every rank must call it.

    Args:
        trainer: In ``validate``.
        module: Its LightningModule.
        request: What to compare.

    Raises:
        CAPError: As `Targets.from_model` and `find_module_units`.
    """
    takers = [variant.pruner for variant in request.variants if variant.pruner.takes_units]
    if takers:
        units = find_module_units(trainer, module, request.include, request.exclude, seed=0)
        for cost in {id(pruner.cost): pruner.cost for pruner in takers}.values():
            prepare_cost(trainer, module, cost, units, seed=0)
        targets = units.targets(module)
        rank_zero_info(f"Pruning {targets.summary}")
        return targets
    ends = find_module_ends(trainer, module, seed=0) if request.include is None else None
    targets = Targets.from_model(module, request.include, request.exclude, ends)
    rank_zero_info(f"Pruning {targets.summary}")
    return targets


def _kind(variant: Variant) -> tuple[type, int | None]:
    """Variants of one kind read alike, if not equally much."""
    return type(variant.pruner.statistic), None if variant.gradients is None else variant.gradients.per_sample


def _first(rows: SharedRows | None, variant: Variant) -> SharedRows | None:
    """As many of the shared rows as the pruner wants."""
    return None if rows is None or variant.gradients is None else replace(rows, most=variant.gradients.n)


def _seconds(event: PruningEvent, rows: SharedRows | None) -> dict[str, float]:
    """Seconds per phase; for shared rows, collecting is counted as if the pruner had done it alone."""
    spent = event.report.seconds
    collect = spent["collect"] if rows is None else rows.seconds * min(1.0, rows.most / max(1, rows.total))
    return {"collect": collect, "solve": spent["plan"] + spent["solve"]}


def _added(seconds: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    return {phase: seconds.get(phase, 0.0) + more.get(phase, 0.0) for phase in {**seconds, **more}}


@contextmanager
def _drawing(variant: Variant) -> Iterator[None]:
    """What a pruner draws from the global generators depends on the seed alone."""
    with rng.preserved():
        rng.seed_by(variant.seed, rng.Domain.PRUNER)
        yield
