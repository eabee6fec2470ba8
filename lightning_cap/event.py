"""One pruning event inside a Lightning run: plan, collect, solve, apply. All of it happens, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_cap import distributed
from lightning_cap.calibration import CalibrationBatches
from lightning_cap.errors import ConfigError
from lightning_cap.gradients import GradientCollector, rows_bytes
from lightning_cap.hooks import Progress
from lightning_cap.masks import MaskSet
from lightning_cap.planning import plan_event
from lightning_cap.pruners.base import Pruner, PruneResult
from lightning_cap.stepping import calibration_loss, in_stage, quiet, ready_batches, undisturbed
from lightning_cap.targets import Targets

_COMPUTE = 4  # domain of the key for generators during the computation of a batch


@dataclass
class EventReport:
    """What an event did, for logs.

    Attributes:
        sparsity: Of all targets, after the event.
        predicted_loss: Predicted increase of the loss, summed over recomputations.
        gradients: Gradient samples used, in all.
        skipped: Gradient samples left out as not finite.
        seconds: Seconds of each phase (plan, collect, solve, apply).
        peak_bytes: Planned peak extra memory.
        stats: The pruner's own numbers, of the last recomputation.
    """

    sparsity: float = 0.0
    predicted_loss: float = 0.0
    gradients: int = 0
    skipped: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("plan", "collect", "solve", "apply"), 0.0))
    peak_bytes: int = 0
    stats: Mapping[str, float] = field(default_factory=dict)


class PruningEvent:
    """Prunes the module of a running Trainer.

    Args:
        trainer: In ``fit`` (or, for the one-shot sweep, in ``validate``).
        module: Its LightningModule.
        pruner: The method.
        targets: The weights.
        masks: Weights that are pruned already; updated by `run`.
        seed: First part of the key that samples and augmentation are drawn by.
        progress: ``progress(phase, done, total)``.
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
    ) -> None:
        self._trainer, self._module, self._pruner = trainer, module, pruner
        self._targets, self._masks, self._seed, self._progress = targets, masks, seed, progress
        self.report = EventReport()

    def run(self, sparsities: Iterable[float], position: int) -> int:
        """Prune to each sparsity in turn, with fresh gradients each time, and apply the result.

        Args:
            sparsities: Rising, one for each recomputation.
            position: Sampler position: how many collections the run has made before.

        Returns:
            The sampler position afterwards.

        Raises:
            CAPError: Whatever went wrong; the model and the masks are then as before.
        """
        before = self._targets.copies()
        masks = dict(self._masks)
        try:
            for sparsity in sparsities:
                result = self._prune(sparsity, position, masks)
                masks = dict(result.masks)
                self.report.predicted_loss += result.predicted_loss
                self.report.stats = result.stats
                position += 1
        except BaseException:
            self._targets.restore(before)
            raise
        self._masks.update(masks)
        self.report.sparsity = self._masks.global_sparsity
        return position

    def path(self, position: int, masks: Mapping[str, Tensor]) -> Any:
        """Collect gradients and solve; the caller closes the path. Nothing in the module changes."""
        pruner, report = self._pruner, self.report
        started = time.perf_counter()
        device = next(iter(self._targets.values())).device
        report.peak_bytes = self._plan()
        report.seconds["plan"] += time.perf_counter() - started
        with self._calibrating(), torch.inference_mode(False):
            collector = self.collector(position) if pruner.num_gradients else None
            source = _Timed(collector if collector is not None else ())
            started = time.perf_counter()
            path = pruner.path(self._targets, source, masks, progress=self._progress)
            _synchronize(device)
            report.seconds["collect"] += source.seconds
            report.seconds["solve"] += time.perf_counter() - started - source.seconds
        if collector is not None:
            report.gradients += collector.collected
            report.skipped += collector.skipped
        return path

    def rehearse(self, position: int) -> None:
        """Plan, and compute one gradient that is thrown away: what cannot work is to fail before training begins."""
        self._plan()
        if not self._pruner.num_gradients:
            return
        with self._calibrating():
            collector = self.collector(position)
            with distributed.agreed("The first gradient"):
                batches = self._batches(position)
                first = next(
                    ready_batches(self._trainer, self._module, batches, (self._seed, position, _COMPUTE)), None
                )
                if first is not None:
                    collector.probe(first)

    def collector(self, position: int) -> GradientCollector:
        """The source of gradient rows at a sampler position."""
        return GradientCollector(
            self._module,
            self._targets,
            calibration_loss(self._module),
            _Repeat(
                lambda: ready_batches(
                    self._trainer, self._module, self._batches(position), (self._seed, position, _COMPUTE)
                )
            ),
            self._pruner.num_gradients,
            self._pruner.samples_per_gradient,
            context=_precision_context(self._trainer),
            scale=_loss_scale(self._trainer),
            progress=self._progress,
        )

    def _batches(self, position: int) -> CalibrationBatches:
        return CalibrationBatches(
            calibration_source(self._trainer, self._module),
            self._pruner.num_gradients * self._pruner.samples_per_gradient,
            self._pruner.samples_per_gradient,
            self._seed,
            position,
        )

    @contextmanager
    def _calibrating(self) -> Iterator[None]:
        training = in_stage(self._trainer, RunningStage.TRAINING)  # augmentation in transfer hooks is the training's
        with undisturbed(self._module), quiet(self._module), training:
            yield

    def _plan(self) -> int:
        device = next(iter(self._targets.values())).device
        needed = self._pruner.peak_bytes(self._targets)
        if self._pruner.num_gradients:
            needed += rows_bytes(self._targets, self._pruner.samples_per_gradient)
        plan = plan_event(needed, device)
        with distributed.agreed("Planning the pruning event"):
            plan.check()
        return plan.peak_bytes

    def _prune(self, sparsity: float, position: int, masks: Mapping[str, Tensor]) -> PruneResult:
        with self.path(position, masks) as path:
            started = time.perf_counter()
            result: PruneResult = path.at(sparsity)
        for tensor in (*result.weights.values(), *result.masks.values()):
            distributed.broadcast(tensor)
        result.apply(self._targets)
        self.report.seconds["apply"] += time.perf_counter() - started
        return result


def calibration_source(trainer: pl.Trainer, module: pl.LightningModule) -> Iterable[Any]:
    """``calibration_dataloader()`` of the datamodule or the module, else the loader over the training data set.

    Raises:
        ConfigError: Neither exists, or the training data is not a single DataLoader.
    """
    datamodule = getattr(trainer, "datamodule", None)
    for owner in (datamodule, module):
        hook = getattr(owner, "calibration_dataloader", None)
        if callable(hook):
            loader: Iterable[Any] = hook()
            return loader
    loaders = trainer.train_dataloader
    if loaders is None:  # outside of fit
        for owner in (datamodule, module):
            if owner is not None and is_overridden("train_dataloader", owner):
                owner.setup("fit")
                loaders = owner.train_dataloader()
                break
    flat = CombinedLoader(loaders).flattened if loaders is not None else []
    if len(flat) != 1 or not isinstance(flat[0], DataLoader):
        kinds = ", ".join(type(loader).__name__ for loader in flat) or "none"
        raise ConfigError(
            f"train_dataloader: calibration needs a single DataLoader to draw samples from, got {kinds}. Define "
            "calibration_dataloader() on the LightningDataModule or LightningModule."
        )
    return flat[0]


class _Repeat:
    """Makes a function that gives an iterator re-iterable."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return self._make()


class _Timed:
    """Passes a source on and adds up the seconds that it takes."""

    def __init__(self, source: Iterable[Mapping[str, Tensor]]) -> None:
        self._source = source
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        chunks = iter(self._source)
        while True:
            started = time.perf_counter()
            chunk = next(chunks, None)
            self.seconds += time.perf_counter() - started
            if chunk is None:
                return
            yield chunk


def _precision_context(trainer: pl.Trainer) -> Callable[[], AbstractContextManager[Any]]:
    plugin = getattr(trainer, "precision_plugin", None)
    return nullcontext if plugin is None else plugin.train_step_context


def _loss_scale(trainer: pl.Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
