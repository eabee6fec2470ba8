"""Bad input to the learning rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_cap import CosineLR, CyclicLinearLR
from lightning_cap.errors import ConfigError
from tests.support.bad_input.table import NO_COUNTS, NO_NUMBERS, Line, wrong


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


def cyclic(**given: Any) -> CyclicLinearLR:
    """Named as the class, with an optimizer."""
    return CyclicLinearLR(**{"optimizer": optimizer(), **given})


def cosine(**given: Any) -> CosineLR:
    """Named as the class, with an optimizer."""
    return CosineLR(**{"optimizer": optimizer(), **given})


def span(value: Any) -> Line:
    def run(_: Path) -> None:
        CosineLR(optimizer()).span(value)

    return Line(f"CosineLR.span({value!r})", run, ConfigError, ("steps=", "whole number"))


def restart(value: Any) -> Line:
    def run(_: Path) -> None:
        CyclicLinearLR(optimizer(), period=3).restart(value)

    return Line(f"CyclicLinearLR.restart({value!r})", run, ConfigError, ("period=", "whole number"))


STATE = CyclicLinearLR(optimizer(), period=3).state_dict()


def restored(state: Any, *words: str) -> Line:
    def run(_: Path) -> None:
        CyclicLinearLR(optimizer()).load_state_dict(state)

    return Line(f"CyclicLinearLR.load_state_dict({state!r})", run, ConfigError, ("state_dict", *words))


LINES = [
    *(restored(state) for state in (None, 3, [STATE], {}, {"last_epoch": 3})),
    restored({**STATE, "base_lrs": [0.1, 0.2]}, "2 parameter groups", "has 1"),
    *wrong(CyclicLinearLR, "optimizer", None, "adam", [0.1], torch.optim.SGD, nn.Linear(2, 2)),
    *wrong(cyclic, "min_lr", *NO_NUMBERS, -1.0, 0.2),
    *wrong(cyclic, "period", *(value for value in NO_COUNTS if value is not None)),
    *wrong(cyclic, "last_epoch", "0", None, True, 1.0, -2, 0, 10),
    *wrong(CosineLR, "optimizer", None, "adam", [0.1]),
    *wrong(cosine, "min_lr", *NO_NUMBERS, -1.0, 0.2),
    *wrong(cosine, "warmup", *NO_NUMBERS, -0.1, 1.0),
    *wrong(cosine, "steps", *(value for value in NO_COUNTS if value is not None)),
    *wrong(cosine, "last_epoch", "0", None, True, 1.0, -2, 0, 10),
    *(span(value) for value in ("3", True, 2.5, 0, [3], None)),
    *(restart(value) for value in ("3", True, 2.5, 0, [3])),
]
