"""Runs of the toy whose callback prunes units, and maybe a second one that prunes the weights that are left."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from lightning_cap import CAPPruningCallback
from lightning_cap.pruners import Magnitude, MagnitudeUnits
from lightning_cap.sparsity import Flops
from lightning_cap.trainer import compat
from lightning_cap.utilities.compiled import plain_name
from tests.support.toy import callback

BOTH_LAYERS = ["net.4.weight", "net.6.weight"]  # of `Toy`, whose units read and make them


def units(schedule: dict[int, float] | None = None, **kwargs: Any) -> CAPPruningCallback:
    """Prunes units of the toy to shares of its FLOPs."""
    return callback(schedule or {1: 0.3, 3: 0.5}, **{"pruner": MagnitudeUnits(), "cost": Flops(), **kwargs})


def weights(schedule: dict[int, float] | None = None, **kwargs: Any) -> CAPPruningCallback:
    """Prunes weights that the toy's units leave."""
    return callback(schedule or {2: 0.6, 4: 0.9}, **{"pruner": Magnitude(), "include": BOTH_LAYERS, **kwargs})


def kept(cb: CAPPruningCallback) -> dict[str, int]:
    """Units that masks keep, by group."""
    found = cb._active.targets.units
    assert found is not None
    return {name: int(left.sum()) for name, left in found.kept(cb.masks).items()}


class Holds(pl.Callback):
    """After each step, looks whether all that is masked is zero: weights, moments of the optimizer, averages.

    Attributes:
        seen: Masked entries of each pruning callback, after each step.
    """

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        masked, own = [], _parameters(pl_module)
        for cb in (c for c in trainer.callbacks if isinstance(c, CAPPruningCallback)):
            for name, mask in cb.masks.items():
                weight = own[name]
                states = trainer.optimizers[0].state.get(weight, {}).values()
                moments = [v for v in states if isinstance(v, torch.Tensor) and v.shape == weight.shape]
                averages = [_parameters(getattr(m, "module", m))[name] for m in compat.averaged_models(trainer)]
                for entry in (weight, *moments, *averages):
                    assert not entry.detach()[~mask].any(), name
            masked.append(sum(int((~mask).sum()) for mask in cb.masks.values()))
        self.seen.append(masked)


def _parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {plain_name(name): parameter for name, parameter in module.named_parameters()}
