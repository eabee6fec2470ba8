"""Bad input to the re-estimation of batch norm, and to what healing has in common."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_cap.errors import ConfigError
from lightning_cap.healing import as_heal
from lightning_cap.healing.base import biases_of
from lightning_cap.healing.batchnorm import BatchNormStatistics, batch_norms, estimate_statistics
from lightning_cap.healing.parts import ModelParts
from lightning_cap.pruners import (
    CAP,
    MFAC,
    CAPUnits,
    DiagonalFisher,
    DropAndGrow,
    FastCAP,
    GradientTimesWeight,
    LayerwiseOBS,
    Magnitude,
    MagnitudeUnits,
    Random,
    Taylor,
    WoodFisher,
)
from lightning_cap.pruners.base import with_heal
from lightning_cap.sparsity.targets import Targets
from tests.support.bad_input.table import NO_COUNTS, NO_HEALS, Line, wrong

NO_MODELS: tuple[Any, ...] = (None, "model", 3, nn.Linear, [nn.Linear(2, 2)], {"a": 1})
NO_FUNCTIONS: tuple[Any, ...] = ("loss", None, 3, [], {})
MODEL = nn.BatchNorm1d(2)
LINEAR = nn.Linear(2, 2)
PARTS: dict[str, Any] = {"model": LINEAR, "targets": Targets({"weight": LINEAR.weight})}
PRUNERS = (CAP, WoodFisher, MFAC, FastCAP, DiagonalFisher, LayerwiseOBS, Magnitude, Random, Taylor, GradientTimesWeight)
GIVEN: dict[str, Any] = {"model": MODEL, "batches": [(torch.ones(4, 2),)], "loss": lambda model, batch: model(batch[0])}
estimate = partial(wrong, estimate_statistics, given=GIVEN)

LINES = [
    *(row for kind in PRUNERS for row in wrong(kind, "heal", *NO_HEALS)),
    *(
        Line(f"as_heal({value!r:.60})", partial(lambda v, _: as_heal(v), value), ConfigError, ("heal=",))
        for value in NO_HEALS
    ),
    *wrong(with_heal, "heal", *NO_HEALS, given={"pruner": CAP()}),
    *(
        Line(
            f"{type(pruner).__name__} is healed",
            partial(lambda p, _: with_heal(p, "layerwise"), pruner),
            ConfigError,
            ("heal=LayerwiseHeal", type(pruner).__name__),
        )
        for pruner in (CAPUnits(), MagnitudeUnits(), DropAndGrow())
    ),
    *wrong(ModelParts, "model", *NO_MODELS, given=PARTS),
    *wrong(ModelParts, "targets", None, "fc.weight", 3, {"fc.weight": 1}, given=PARTS),
    *wrong(ModelParts, "heals", None, 1, "yes", given=PARTS),
    *wrong(ModelParts, "statistics", None, 1, "yes", given=PARTS),
    *wrong(ModelParts(**PARTS).restore, "values", None, "weight", 3, [torch.ones(2)]),
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
