"""What a comparison measures of a model: metrics and losses."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl

from lightning_cap.calibration.statistics import GradientSamples
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.calibration import (
    calibrating,
    calibration_batches,
    calibration_loss,
    mean_loss,
    precision_context,
)
from lightning_cap.trainer.evaluation import evaluate


class Measure:
    """Metrics and losses of the module as it is, each taken once for the same weights.

    Args:
        trainer: In ``validate``.
        module: Its LightningModule.
        targets: The weights that change from one measurement to the next.
        samples: Calibration samples for the loss, 0 for no such loss.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, targets: Targets, samples: int) -> None:
        self._trainer, self._module, self._targets, self._samples = trainer, module, targets, samples
        self._metrics: dict[str, dict[str, float]] = {}
        self._losses: dict[tuple[str, int], float | None] = {}

    def cache(self, solution: str, metrics: Mapping[str, float]) -> None:
        """Take up the metrics of an earlier run."""
        self._metrics[solution] = dict(metrics)

    def metrics(self, solution: str) -> dict[str, float]:
        """What the module logs in a pass over the validation data.

        Args:
            solution: Checksum of the targets' weights.
        """
        if solution not in self._metrics:
            self._metrics[solution] = evaluate(self._trainer, self._module)
        return dict(self._metrics[solution])

    def calibration_loss(self, solution: str, seed: int) -> float | None:
        """Mean loss over the first calibration samples of a seed, those that gradients are taken of."""
        if not self._samples:
            return None
        if (solution, seed) not in self._losses:
            self._losses[solution, seed] = self._calibration_loss(seed)
        return self._losses[solution, seed]

    def _calibration_loss(self, seed: int) -> float:
        trainer, module = self._trainer, self._module
        with calibrating(trainer, module):
            batches = calibration_batches(trainer, module, GradientSamples(self._samples), self._targets, (seed, 0))
            loss, device = calibration_loss(module), self._targets.device
            return mean_loss(module, batches, loss, self._samples, device, precision_context(trainer))


def loss_name(metrics: Mapping[str, float]) -> str | None:
    """The metric that is the validation loss, if one is logged."""
    names = [name for name in metrics if "loss" in name.lower()]
    return min(names, key=lambda name: ("val" not in name.lower(), len(name)), default=None)
