"""A heal whose work is known, and a model with batch norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.calibration.rows import Loss
from lightning_cap.healing import Heal, HealReport
from lightning_cap.healing.base import biases_of
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.progress import Progress
from tests.support.toy import CLASSES, FEATURES


@dataclass(kw_only=True)
class Shift(Heal):
    """Adds a number to every kept weight and every bias, and takes note of what it was given; or fails at a call."""

    num_inputs: int = 32
    by: float = 0.01
    fails_at: int = -1
    calls: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def run(
        self,
        model: nn.Module,
        targets: Targets,
        masks: Mapping[str, Tensor],
        dense: Mapping[str, Tensor],
        batches: Iterable[Any],
        loss: Loss,
        *,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Progress | None = None,
    ) -> HealReport:
        read = list(batches)
        self.calls.append({"masks": masks, "dense": dict(dense), "batches": read, "training": model.training})
        with torch.no_grad():
            for name, weight in targets.items():
                weight.add_(self.by * masks[name])
            for bias in biases_of(model, targets).values():
                bias.add_(self.by)
        if len(self.calls) - 1 == self.fails_at:
            raise RuntimeError("healing failed")
        if progress is not None:
            progress("heal", 1, 1)
        return HealReport(samples=sum(len(batch[0]) for batch in read), healed=tuple(targets))


def normalized_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16),
        nn.ReLU(), nn.Linear(16, CLASSES),
    )  # fmt: skip
    for layer in net:
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.normal_()  # type: ignore[union-attr]
    return net.train()
