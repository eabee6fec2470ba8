"""What follows the pruning of weights: the choice among solutions, healing, and new statistics of batch norm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_cap.calibration.rows import Loss
from lightning_cap.healing import Heal
from lightning_cap.healing.batchnorm import NUM_SAMPLES, batch_norms, estimate_statistics
from lightning_cap.pruners.paths import PruneResult
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.calibration import (
    calibrating,
    calibration_loss,
    drawn_batches,
    mean_loss,
    precision_context,
)
from lightning_cap.utilities.progress import Progress
from lightning_cap.utilities.rng import Domain

#: Samples that the losses of several solutions are measured on.
CHOICE_SAMPLES = 256

#: Gives, inside a context, this process's batches of so many samples, for a use, at a collection index.
Reader = Callable[[int, Domain, int], AbstractContextManager[Iterable[Any]]]


class Mender:
    """Works on one model. Every process must call its methods.

    Args:
        model: With the targets.
        targets: Its weights that are pruned.
        heal: How to heal, None for not.
        reader: What batches are read by, with the model in eval mode inside; None: they cannot be read again.
        loss: Of a batch.
        context: Entered around every forward pass.
        progress: ``progress(phase, done, total)``.

    Attributes:
        healed: Samples that healing has read so far.
        recalibrated: Samples that batch norm was estimated from so far.
        seconds: By phase: ``"heal"`` and ``"recalibrate"``, those that there were.
        stats: What the last healing tells of itself, each as ``heal_...``.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        heal: Heal | None,
        reader: Reader | None,
        loss: Loss,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Progress | None = None,
    ) -> None:
        self._model, self._targets, self._heal, self._reader = model, targets, heal, reader
        self._loss, self._context, self._progress = loss, context, progress
        self.healed = self.recalibrated = 0
        self.seconds: dict[str, float] = {}
        self.stats: dict[str, float] = {}

    def choose(self, candidates: Sequence[PruneResult], index: int) -> PruneResult:
        """The one of least mean loss on calibration samples; the first of equals, and where nothing can be read twice.

        Args:
            candidates: See `PruningPath.candidates`.
            index: Of the collection.
        """
        if len(candidates) == 1 or self._reader is None:
            return candidates[0]
        before, losses = self._targets.copies(), []
        try:
            for candidate in candidates:
                candidate.apply(self._targets)
                with self._reader(CHOICE_SAMPLES, Domain.CHOICE, index) as batches:
                    loss = mean_loss(
                        self._model, batches, self._loss, CHOICE_SAMPLES, self._targets.device, self._context
                    )
                losses.append(loss if math.isfinite(loss) else math.inf)
        finally:
            self._targets.restore(before)
        best = losses.index(min(losses))
        return replace(candidates[best], stats={**candidates[best].stats, "candidate": float(best)})

    def heal(self, masks: Mapping[str, Tensor], dense: Mapping[str, Tensor], index: int) -> bool:
        """Heal the model, which has pruned weights, if it is to be and pruning has changed it.

        Args:
            masks: Of the targets.
            dense: See `Heal.run`.
            index: Of the collection.

        Returns:
            Whether it was.
        """
        if self._heal is None or self._reader is None:
            return False
        if all(torch.equal(weight, dense[name]) for name, weight in self._targets.weights().items()):
            return False
        with self._timed("heal"), self._reader(self._heal.num_inputs, Domain.HEAL, index) as batches:
            report = self._heal.run(
                self._model,
                self._targets,
                masks,
                dense,
                batches,
                self._loss,
                context=self._context,
                progress=self._progress,
            )
        if report.left and not self.healed:
            name, why = next(iter(report.left.items()))
            more = f" (and {len(report.left) - 1} more)" if len(report.left) > 1 else ""
            rank_zero_info(f"heal: {name}{more} is left as it was pruned: {why}.")
        self.healed += report.samples
        self.stats = {f"heal_{name}": value for name, value in report.stats.items()}
        return True

    def recalibrate(self, index: int) -> None:
        """Estimate the statistics of batch norm anew, and write them into the model.

        Args:
            index: Of the last collection.
        """
        if self._reader is None or not batch_norms(self._model):
            return
        with self._timed("recalibrate"):
            with self._reader(NUM_SAMPLES, Domain.BATCH_NORM, index) as batches:
                found = estimate_statistics(
                    self._model, batches, self._loss, context=self._context, progress=self._progress
                )
            found.write(self._model)  # outside: the reader leaves buffers as it found them
        self.recalibrated += found.samples

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self._targets.device.type == "cuda":
            torch.cuda.synchronize(self._targets.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


def module_mender(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    targets: Targets,
    heal: Heal | None,
    seed: int,
    progress: Progress | None = None,
) -> Mender:
    """That of the module of a running Trainer, which draws its samples by the seed and the collection index.

    Args:
        trainer: In ``fit`` or ``validate``.
        module: Its LightningModule.
        targets: See `Mender`.
        heal: See `Mender`.
        seed: First part of the key.
        progress: See `Mender`.
    """

    @contextmanager
    def reader(samples: int, use: Domain, index: int) -> Iterator[Iterable[Any]]:
        with calibrating(trainer, module):
            yield drawn_batches(trainer, module, samples, (seed, index), use)

    return Mender(module, targets, heal, reader, calibration_loss(module), precision_context(trainer), progress)


def note_missing_batch_norm(model: nn.Module, recalibrate: bool) -> None:
    """Say it where there is nothing to recalibrate.

    Args:
        model: Any.
        recalibrate: Whether it was to be done.
    """
    if recalibrate and not batch_norms(model):
        rank_zero_info(
            f"recalibrate=True: {type(model).__name__} has no batch norm that keeps statistics, so none are estimated."
        )
