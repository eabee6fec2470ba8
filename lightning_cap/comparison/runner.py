"""The work of a comparison inside one validation run: collect, solve, apply, measure, put the weights back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_cap.calibration.sources import TimedSource
from lightning_cap.comparison.artifacts import Artifacts
from lightning_cap.comparison.fingerprint import checksum, identity_of
from lightning_cap.comparison.gradient_cache import SharedRows, find, share
from lightning_cap.comparison.measure import Measure, loss_name
from lightning_cap.comparison.record_store import RecordStore, digest
from lightning_cap.comparison.records import ComparisonRecord, save_masks
from lightning_cap.comparison.variants import Request, Variant, check_targets, naming
from lightning_cap.errors import ConfigError
from lightning_cap.export.records import EXPORTS, ExportRecord
from lightning_cap.export.safetensors import save_plain_weights, save_weights
from lightning_cap.pruners.paths import PruneResult
from lightning_cap.sparsity.cost import steps_to
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets, measured_sparsity
from lightning_cap.trainer.calibration import calibrating
from lightning_cap.trainer.evaluation import evaluate
from lightning_cap.trainer.event import PruningEvent
from lightning_cap.trainer.progress_bar import event_progress
from lightning_cap.utilities import distributed, rng
from lightning_cap.utilities.distributed import check_equal_on_all_ranks
from lightning_cap.utilities.progress import Progress
from lightning_cap.utilities.records import known_records

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
        self._targets = Targets.from_model(module, request.include, request.exclude)
        self._masks = MaskSet(self._targets)
        self._masks.mask_zeros()
        check_targets(request.variants, self._targets, self._masks, request.sparsities)
        self._before = self._targets.copies()
        calibrates = any(variant.pruner.statistic is not None for variant in request.variants)
        identity = {
            **identity_of(trainer, module, self._targets, calibrates),
            "loss_samples": request.loss_samples,
        }
        self._measure = Measure(trainer, module, self._targets, request.loss_samples if calibrates else 0)
        wanted = [(v, s) for v in request.variants for s in request.sparsities]
        own = {(v.slug, s): v.fingerprint(s, identity) for v, s in wanted}
        self._fingerprints: dict[tuple[str, float], str] = distributed.gather_objects(own)[0]
        self._dense_fingerprint = checksum(identity)
        self._results = RecordStore(request.folder, [self._dense_fingerprint, *self._fingerprints.values()])
        self._refuse_foreign_exports()
        self._artifacts = Artifacts(request, self._targets, self._fingerprints)
        for record in self._results.records():
            self._measure.cache(record.solution, record.metrics)
        self._todo: dict[Variant, list[float]] = {}
        self._started = 0
        self._dense_losses: dict[int, float | None] = {}

    def run(self) -> list[ComparisonRecord]:
        """Do what is missing; the records in the order of the request, the dense model's first."""
        try:
            self._todo = {v: left for v in self._request.variants if (left := self._missing(v))}
            self._dry_run()
            self._dense = self._dense_record()
            for seed in {variant.seed for variant in self._todo}:
                self._dense_losses[seed] = self._measure.calibration_loss(self._dense.solution, seed)
            for seed in dict.fromkeys(v.seed for v in self._request.variants):
                self._run_seed(seed)
            if self._artifacts.surface_wanted:
                with event_progress(self._trainer, "Loss surface") as progress:
                    loss = self._surface_loss()
                    self._artifacts.save_surface(loss, lambda done, total: progress("loss", done, total))
        finally:
            self._targets.restore(self._before)
        self._results.save()
        if self._request.folder is not None and distributed.gather_objects(None):  # when all have come here
            shutil.rmtree(self._request.folder / _WORK, ignore_errors=True)
        return self._results.records()

    def _dry_run(self) -> None:
        """Compute one batch for each kind of source, and throw it away: what cannot work is to fail before anything runs."""
        kinds = {_kind(v): v for v in self._todo if v.pruner.statistic is not None}
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

    def _missing(self, variant: Variant) -> list[float]:
        """Sparsities whose record, or a file of it, is not there yet."""
        return [s for s in self._request.sparsities if not self._has(variant, s)]

    def _has(self, variant: Variant, sparsity: float) -> bool:
        keys = ["masks"] if self._request.folder is not None else []
        keys += ["weights"] if self._request.weights_file(variant, sparsity) else []
        kept = self._artifacts.solution_file(variant, sparsity)
        record = self._results.get(self._fingerprints[variant.slug, sparsity], keys)
        return record is not None and (not kept or self._results.exists(kept))

    def _shared(self, readers: Sequence[Variant]) -> SharedRows | None:
        """The rows for pruners of one seed and ``samples_per_gradient``, if there is more than one."""
        request, wanted = self._request, {v: v.gradients for v in readers if v.gradients is not None}
        largest = max(wanted, key=lambda v: wanted[v].n)
        m, most = wanted[largest].per_sample, wanted[largest].n
        folder = None if request.folder is None else request.folder / _WORK / f"rows-seed={largest.seed}-m={m}"
        key = f"{self._dense_fingerprint} {largest.seed} {m}"
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
                with _drawing(variant):
                    result = path.at(sparsity)
                seconds = {**solved, "apply": time.perf_counter() - started}
                self._record(variant, sparsity, result, result.saliency, seconds)

    def _in_steps(self, variant: Variant, sparsity: float, rows: SharedRows | None, progress: Progress) -> None:
        """Rising sparsities with fresh gradients for each; the first step is at the dense model and shares its rows."""
        goals = steps_to(sparsity, self._masks.global_sparsity, variant.num_recomputations)
        masks: Mapping[str, Tensor] = self._masks
        saliency, seconds = 0.0, {"collect": 0.0, "solve": 0.0, "apply": 0.0}
        try:
            for step, goal in enumerate(goals):
                event = self._event(variant, progress)
                own = rows if step == 0 else None
                with _drawing(variant), event.path(step, masks, own) as path:
                    started = time.perf_counter()
                    result = path.at(goal)
                    taken = {**_seconds(event, own), "apply": time.perf_counter() - started}
                result.apply(self._targets)
                masks, saliency = result.masks, saliency + result.saliency
                seconds = {phase: seconds[phase] + taken[phase] for phase in seconds}
            self._record(variant, sparsity, result, saliency, seconds)
        finally:
            self._targets.restore(self._before)

    def _record(
        self, variant: Variant, sparsity: float, result: PruneResult, saliency: float, seconds: dict[str, float]
    ) -> None:
        """Apply, measure, keep the record and its files, put the weights back."""
        result.apply(self._targets)
        try:
            check_equal_on_all_ranks({"the weights": self._targets.weights(), "the masks": result.masks})
            started = time.perf_counter()
            measured = self._measured()
            increase = self._loss_increase(measured["metrics"], measured["solution"], variant.seed)
            record = ComparisonRecord(
                **variant.describe(sparsity),
                **measured,
                predicted_loss=saliency if variant.pruner.predicts_loss else None,
                loss_increase=increase,
                seconds={**seconds, "evaluate": time.perf_counter() - started},
                stats=dict(result.stats),
                masks=self._request.masks_file(variant, sparsity),
                weights=self._request.weights_file(variant, sparsity),
                fingerprint=self._fingerprints[variant.slug, sparsity],
            )
            self._save_files(variant, record, result)
            self._results.add(record)
        finally:
            self._targets.restore(self._before)

    def _measured(self) -> dict[str, Any]:
        """What is measured of the weights as they are now."""
        weights = self._targets.weights()
        solution = digest(weights)
        return {
            "sparsity": measured_sparsity(self._targets),
            "sparsities": {name: 1 - int(w.count_nonzero()) / w.numel() for name, w in weights.items()},
            "metrics": self._measure.metrics(solution),
            "solution": solution,
        }

    def _loss_increase(self, metrics: Mapping[str, float], solution: str, seed: int) -> dict[str, float | None]:
        now, dense = (each.get(loss_name(each) or "") for each in (metrics, self._dense.metrics))
        calibration = self._measure.calibration_loss(solution, seed)
        return {"validation": _less(now, dense), "calibration": _less(calibration, self._dense_losses.get(seed))}

    def _dense_record(self) -> ComparisonRecord:
        record = self._results.get(self._dense_fingerprint)
        if record is None:
            record = ComparisonRecord(
                pruner="dense",
                label="dense",
                seed=None,
                goal=0.0,
                predicted_loss=0.0,
                fingerprint=self._dense_fingerprint,
                **self._measured(),
            )
            self._results.add(record)
        return record

    def _save_files(self, variant: Variant, record: ComparisonRecord, result: PruneResult) -> None:
        folder, kept = self._request.folder, self._artifacts.solution_file(variant, record.goal)
        with distributed.raise_on_all_ranks("Saving the masks and weights"):
            if folder is not None and distributed.rank() == 0:
                save_masks(folder / record.masks, result.masks)
                if record.weights:
                    path = folder / record.weights
                    save_weights(self._module, self._targets, path, sparsity=record.sparsity, goal=record.goal)
                if kept:
                    save_plain_weights(folder / kept, self._targets.weights(), {})

    def _refuse_foreign_exports(self) -> None:
        """Refuse to write weights beside an ``exports.jsonl`` that holds something else."""
        request = self._request
        with distributed.raise_on_all_ranks(f"Reading {EXPORTS}"):
            if request.folder is not None and distributed.rank() == 0:
                files = {request.weights_file(v, s) for v in request.variants for s in request.sparsities}
                for folder in {(request.folder / file).parent for file in files if file}:
                    known_records(folder / EXPORTS, ExportRecord)

    def _event(self, variant: Variant, progress: Progress | None = None) -> PruningEvent:
        args = self._trainer, self._module, variant.pruner, self._targets, self._masks, variant.seed
        return PruningEvent(*args, progress)

    def _surface_loss(self) -> Callable[[], float]:
        """The validation loss, of as many batches as the surface wants."""
        name = loss_name(self._dense.metrics)
        batches = self._request.surface.batches if self._request.surface is not None else None
        if name is None:
            raise ConfigError(
                f"surface: the module logs no loss in validation, but only {list(self._dense.metrics)}. Log one, under a name "
                "with 'loss' in it."
            )
        return lambda: evaluate(self._trainer, self._module, batches)[name]


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


def _less(value: float | None, dense: float | None) -> float | None:
    return None if value is None or dense is None else value - dense


@contextmanager
def _drawing(variant: Variant) -> Iterator[None]:
    """What a pruner draws from the global generators depends on the seed alone."""
    with rng.preserved():
        rng.seed_by(variant.seed, rng.Domain.PRUNER)
        yield
