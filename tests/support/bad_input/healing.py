"""Bad input to what heals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_cap.healing import DistillHeal, LayerwiseHeal
from lightning_cap.sparsity.targets import Targets
from tests.support.bad_input.calibration import NO_FUNCTIONS, NO_OBJECTS
from tests.support.bad_input.table import NO_COUNTS, NO_NUMBERS, Line, wrong

LINEAR = nn.Linear(6, 4)
nn.init.ones_(LINEAR.weight)  # shown in names, which are the same in every process
TARGETS = Targets({"weight": LINEAR.weight})


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return torch.as_tensor(model(batch[0]).square().mean())


def heal(**named: Any) -> None:
    LayerwiseHeal(num_inputs=4).run(**named)


def distill(**named: Any) -> None:
    DistillHeal(num_inputs=4, steps=1).run(**named)


def running(heal: Callable[..., None]) -> list[Line]:
    given: Mapping[str, Any] = {
        "model": LINEAR,
        "targets": TARGETS,
        "masks": {"weight": torch.ones(4, 6, dtype=torch.bool)},
        "dense": {"weight": torch.ones(4, 6), "bias": torch.ones(4)},
        "batches": [(torch.ones(4, 6),)],
        "loss": loss,
    }
    mask, bias = torch.ones(4, 6, dtype=torch.bool), torch.ones(3)
    return [
        *wrong(heal, "model", *NO_OBJECTS, given=given),
        *wrong(heal, "targets", *NO_OBJECTS, LINEAR, {"weight": LINEAR.weight}, given=given),
        *wrong(heal, "masks", None, 3, "weight", [mask], mask, given=given),
        *wrong(heal, "masks", {}, {"weight": 0.5}, {"weight": torch.ones(4, 6)}, {"weight": mask[:3]}, given=given,
               words=("'weight'", "(4, 6)")),
        *wrong(heal, "dense", None, 3, "weight", [torch.ones(4, 6)], given=given),
        *wrong(heal, "dense", {}, {"weight": 0.5}, {"weight": mask}, {"weight": torch.ones(24)}, given=given,
               words=("'weight'", "(4, 6)")),
        *wrong(heal, "dense", {"weight": torch.ones(4, 6), "bias": bias}, {"weight": torch.ones(4, 6), "bias": 1.0},
               given=given, words=("'bias'", "(4,)")),
        *wrong(heal, "batches", "x", None, 3, {}, torch.ones(2, 6), given=given),
        *wrong(heal, "loss", *NO_FUNCTIONS, given=given),
        *wrong(heal, "context", "autocast", None, 3, given=given),
        *wrong(heal, "progress", "bar", 3, [], given=given),
    ]  # fmt: skip


LINES = [
    *wrong(LayerwiseHeal, "num_inputs", *NO_COUNTS, 10**12),
    *wrong(LayerwiseHeal, "ridge", *NO_NUMBERS, 0, -0.1),
    *[line for run in (heal, distill) for line in running(run)],
    *[line for name in ("num_inputs", "steps", "batch_size") for line in wrong(DistillHeal, name, *NO_COUNTS, 10**12)],
    *[line for name in ("lr", "temperature") for line in wrong(DistillHeal, name, *NO_NUMBERS, 0, -0.1)],
    *wrong(DistillHeal, "loss", None, 1, "ce", ["kl"], True),
]
