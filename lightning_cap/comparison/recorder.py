"""Measures pruned weights and keeps the records of it: those that earlier runs have left, and new ones."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_cap.comparison.fingerprint import Basis, checksum
from lightning_cap.comparison.measure import Measure, loss_name
from lightning_cap.comparison.record_store import RecordStore, digest
from lightning_cap.comparison.records import UNPRUNED, ComparisonRecord, save_masks
from lightning_cap.comparison.request import Request
from lightning_cap.comparison.variants import Variant
from lightning_cap.export.records import EXPORTS, ExportRecord
from lightning_cap.export.safetensors import save_weights
from lightning_cap.healing.parts import ModelParts
from lightning_cap.pruners.paths import PruneResult
from lightning_cap.sparsity.targets import Targets, measured_sparsity
from lightning_cap.trainer.saving import saving
from lightning_cap.utilities import distributed
from lightning_cap.utilities.distributed import check_equal_on_all_ranks
from lightning_cap.utilities.records import known_records

_SPARSE = 5e-4  # zeros from which on a model is not called dense: 0.1 % when it is rounded


class Recorder:
    """The records of a comparison, and the measuring of new ones.

    Args:
        trainer: In ``validate``.
        module: Its LightningModule.
        request: What to compare.
        targets: The weights.
        parts: What changes of the module, the weights among it.
        before: Copies of it before pruning.
        basis: What the records depend on beside their settings.

    Raises:
        DataError: A file in the folder holds something else.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        request: Request,
        targets: Targets,
        parts: ModelParts,
        before: Mapping[str, Tensor],
        basis: Basis,
    ) -> None:
        self._module, self._request, self._targets, self._basis = module, request, targets, basis
        self._parts, self._before = parts, before
        self._keys: dict[str, str] = distributed.gather_objects({v.slug: v.key for v in request.variants})[0]
        places = [(variant.label, variant.seed, goal) for variant in request.variants for goal in request.sparsities]
        self.store = RecordStore(request.folder, [(UNPRUNED, None, 0.0), *places], basis.holds)
        self._refuse_foreign_exports()
        self._measure = Measure(trainer, module, targets, request.loss_samples if basis.calibration else 0)
        for record in self.store.all():
            self._measure.cache(record.solution, record.metrics)
        self._losses_before: dict[int, float | None] = {}

    def known(self, variant: Variant, goal: float) -> ComparisonRecord | None:
        """The record, if there is one already that was made with the same settings and has its masks."""
        record = self.store.get((variant.label, variant.seed, goal))
        if record is None or record.depends.get("settings") != self._keys[variant.slug]:
            return None
        return record if self._request.folder is None or self.store.exists(record.masks) else None

    def fingerprint(self, variant: Variant, goal: float) -> str:
        """That of the record that there is, or will be."""
        record = self.known(variant, goal)
        return self._fingerprint(self._depends(variant), goal) if record is None else record.fingerprint

    def is_whole(self, variant: Variant, record: ComparisonRecord) -> bool:
        """Whether a record has the loss and the file of weights that are wanted of it."""
        loss = self._depends(variant)["loss"]
        written = not self._request.weights_file(variant, record.goal) or self.store.exists(record.weights)
        return written and loss in ("", record.depends.get("loss"))

    def measure_unpruned(self, seeds: Iterable[int]) -> None:
        """Take the metrics of the model as it is now, and its losses on the calibration samples of the seeds."""
        record = self.store.get((UNPRUNED, None, 0.0))
        if record is None:
            depends, measured = self._depends(None), self._measured()
            sparse = measured["sparsity"] >= _SPARSE
            record = ComparisonRecord(
                pruner=UNPRUNED,
                label=f"start ({100 * measured['sparsity']:.3g} % sparse)" if sparse else UNPRUNED,
                seed=None,
                goal=0.0,
                predicted_loss=0.0,
                depends=depends,
                fingerprint=self._fingerprint(depends, 0.0),
                **measured,
            )
            self.store.add(record)
        self.unpruned = record
        for seed in seeds:
            self._losses_before[seed] = self._measure.calibration_loss(record.solution, seed)

    def add(
        self, variant: Variant, goal: float, result: PruneResult, saliency: float, seconds: dict[str, float], keep: bool
    ) -> None:
        """Measure the model, which has the result's weights, and keep the record with its files.

        Args:
            variant: What gave the result.
            goal: That was asked for.
            result: What it gave.
            saliency: Over all steps.
            seconds: Per phase.
            keep: Whether to write the weights that are kept beside the masks.
        """
        check_equal_on_all_ranks({"the weights": self._parts.tensors(), "the masks": result.masks})
        started, depends = time.perf_counter(), self._depends(variant)
        measured = self._measured()
        record = ComparisonRecord(
            **variant.describe(goal),
            **measured,
            predicted_loss=saliency if variant.pruner.predicts_loss else None,
            loss_increase=self._loss_increase(measured["metrics"], measured["solution"], variant.seed),
            seconds={**seconds, "evaluate": time.perf_counter() - started},
            stats=dict(result.stats),
            saving=saving(variant.pruner, self._targets, result.masks),
            masks=self._request.masks_file(variant, goal),
            weights=self._request.weights_file(variant, goal),
            depends=depends,
            fingerprint=self._fingerprint(depends, goal),
        )
        with distributed.raise_on_all_ranks("Saving the masks and weights"):
            if self._request.folder is not None and distributed.rank() == 0:
                file = self._request.folder / record.masks
                save_masks(
                    file, result.masks, self._targets.weights() if keep else None, self._others() if keep else {}
                )
                self._save_weights(record)
        self.store.add(record)

    def mend(self, variant: Variant, record: ComparisonRecord) -> None:
        """Measure the loss of the model anew, which has a record's weights, and write them if they are wanted."""
        loss = self._depends(variant)["loss"]
        if loss not in ("", record.depends.get("loss")):
            increase = self._loss_increase(record.metrics, record.solution, variant.seed)
            record = replace(record, loss_increase=increase, depends={**record.depends, "loss": loss})
        wanted = self._request.weights_file(variant, record.goal)
        missing = bool(wanted) and not self.store.exists(record.weights)
        if missing:
            record = replace(record, weights=wanted)
        with distributed.raise_on_all_ranks("Saving the weights"):
            if missing and distributed.rank() == 0:
                self._save_weights(record)
        self.store.add(record)

    def _save_weights(self, record: ComparisonRecord) -> None:
        if record.weights and self._request.folder is not None:
            path = self._request.folder / record.weights
            save_weights(self._module, self._targets, path, sparsity=record.sparsity, goal=record.goal)

    def _depends(self, variant: Variant | None) -> dict[str, str]:
        return {
            "settings": self._keys[variant.slug] if variant is not None else "",
            "model": self._basis.model,
            "data": self._basis.data,
            "calibration": self._basis.calibration,
            "reads": "yes" if variant is not None and variant.calibrates else "",
            "loss": self._basis.loss(self._request.loss_samples) if variant is not None else "",
        }

    def _fingerprint(self, depends: Mapping[str, str], goal: float) -> str:
        return checksum([{**depends, "loss": ""}, goal])

    def _measured(self) -> dict[str, Any]:
        """What is measured of the weights as they are now."""
        weights: dict[str, Tensor] = self._targets.weights()
        solution = digest({**weights, **self._others()})
        return {
            "sparsity": measured_sparsity(self._targets),
            "sparsities": {name: 1 - int(w.count_nonzero()) / w.numel() for name, w in weights.items()},
            "metrics": self._measure.metrics(solution),
            "solution": solution,
        }

    def _others(self) -> dict[str, Tensor]:
        """What has changed beside the weights: biases and statistics of batch norm."""
        now = self._parts.tensors().items()
        return {n: value for n, value in now if n not in self._targets and not torch.equal(value, self._before[n])}

    def _loss_increase(self, metrics: Mapping[str, float], solution: str, seed: int) -> dict[str, float | None]:
        now, before = (each.get(loss_name(each) or "") for each in (metrics, self.unpruned.metrics))
        calibration = self._measure.calibration_loss(solution, seed)
        return {"validation": _less(now, before), "calibration": _less(calibration, self._losses_before.get(seed))}

    def _refuse_foreign_exports(self) -> None:
        """Refuse to write weights beside an ``exports.jsonl`` that holds something else."""
        request = self._request
        with distributed.raise_on_all_ranks(f"Reading {EXPORTS}"):
            if request.folder is not None and distributed.rank() == 0:
                files = {request.weights_file(v, s) for v in request.variants for s in request.sparsities}
                for folder in {(request.folder / file).parent for file in files if file}:
                    known_records(folder / EXPORTS, ExportRecord)


def _less(value: float | None, before: float | None) -> float | None:
    return None if value is None or before is None else value - before
