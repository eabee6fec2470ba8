"""What is true of a run as it goes on, as a user would see it."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from tests.support.toy import TARGET, zeros


class Watch(pl.Callback):
    """Looks at the target of `Toy`. Put it behind the pruning callback.

    Attributes:
        sparsity: Share of zeros after each step.
        lr: Learning rate after each step.
        moments: Sum of the optimizer's state of pruned weights after each step.
        gradients: Sum of the gradients of pruned weights before each step.
        weights: At the start of each epoch, after the event.
        masks: At the same time.
        states: Tensors of the optimizer at the same time.
    """

    def __init__(self) -> None:
        self.sparsity: list[float] = []
        self.lr: list[float] = []
        self.moments: list[float] = []
        self.gradients: list[float] = []
        self.weights: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        cb = next(c for c in trainer.callbacks if hasattr(c, "masks"))
        self.masks.append(cb.masks[TARGET].clone())
        self.weights.append(pl_module.net[4].weight.detach().clone())
        self.states.append({name: value.clone() for name, value in self._state(trainer, pl_module).items()})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        pruned = zeros(pl_module)
        self.gradients.append(float(pl_module.net[4].weight.grad[pruned].abs().sum()) if pruned.any() else 0.0)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pruned = zeros(pl_module)
        self.sparsity.append(float(pruned.float().mean()))
        self.lr.append(trainer.optimizers[0].param_groups[0]["lr"])
        state = [value for value in self._state(trainer, pl_module).values() if value.shape == pruned.shape]
        self.moments.append(sum(float(value[pruned].abs().sum()) for value in state))

    def _state(self, trainer: Any, pl_module: Any) -> dict[str, Tensor]:
        state = trainer.optimizers[0].state.get(pl_module.net[4].weight, {})
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def generators() -> tuple[Any, ...]:
    """States of the global generators of Python, NumPy and torch."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
