"""What a comparison measures of a model: metrics and losses."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch

from lightning_cap.calibration.batches import batch_size
from lightning_cap.calibration.statistics import GradientSamples
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.calibration import (
    calibrating,
    calibration_batches,
    calibration_loss,
    precision_context,
)
from lightning_cap.trainer.evaluation import evaluate
from lightning_cap.utilities import distributed


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
        sums = torch.zeros(2, dtype=torch.float64)
        context, loss = precision_context(trainer), calibration_loss(module)
        with (
            calibrating(trainer, module),
            torch.no_grad(),
            distributed.raise_on_all_ranks("The loss on calibration samples"),
        ):
            statistic = GradientSamples(self._samples)
            for batch in calibration_batches(trainer, module, statistic, self._targets, (seed, 0)):
                with context():
                    value = float(loss(module, batch))
                size = batch_size(batch, default=1)
                sums += torch.tensor([value * size, size], dtype=torch.float64)
                if float(sums[1]) * distributed.world_size() >= self._samples:
                    break
        total = distributed.sum_over_ranks(sums.float().to(self._targets.device))
        return float(total[0] / total[1])


def loss_name(metrics: Mapping[str, float]) -> str | None:
    """The metric that is the validation loss, if one is logged."""
    names = [name for name in metrics if "loss" in name.lower()]
    return min(names, key=lambda name: ("val" not in name.lower(), len(name)), default=None)
