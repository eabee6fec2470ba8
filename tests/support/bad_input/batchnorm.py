"""Bad input to the re-estimation of batch norm, and to what healing has in common."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_cap.healing.base import biases_of
from lightning_cap.healing.batchnorm import BatchNormStatistics, batch_norms, estimate_statistics
from tests.support.bad_input.table import NO_COUNTS, wrong

NO_MODELS: tuple[Any, ...] = (None, "model", 3, nn.Linear, [nn.Linear(2, 2)], {"a": 1})
NO_FUNCTIONS: tuple[Any, ...] = ("loss", None, 3, [], {})
MODEL = nn.BatchNorm1d(2)
GIVEN: dict[str, Any] = {"model": MODEL, "batches": [(torch.ones(4, 2),)], "loss": lambda model, batch: model(batch[0])}
estimate = partial(wrong, estimate_statistics, given=GIVEN)

LINES = [
    *estimate("model", *NO_MODELS),
    *estimate("batches", None, 3, "data", True, torch.ones(4, 2), {"x": 1}, object),
    *estimate("loss", *NO_FUNCTIONS),
    *estimate("num_samples", *NO_COUNTS),
    *estimate("context", *NO_FUNCTIONS),
    *estimate("progress", "bar", 3, True, []),
    *wrong(batch_norms, "model", *NO_MODELS),
    *wrong(BatchNormStatistics({}, {}, 0).write, "model", *NO_MODELS),
    *wrong(biases_of, "model", *NO_MODELS, given={"targets": None}),
    *wrong(biases_of, "targets", None, "fc.weight", 3, {"fc.weight": 1}, given={"model": MODEL}),
]
