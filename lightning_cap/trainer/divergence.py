"""Tells a model whose training has diverged from one that can be pruned, before a pruner meets it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_cap.calibration.batches import batch_size, slice_batch
from lightning_cap.errors import GradientError
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.calibration import precision_context
from lightning_cap.utilities.sharded import local

_TRAINED = (
    "after {steps} training steps, so training has diverged. Go back to an earlier checkpoint, and train on with a lower learning "
    "rate or gradient_clip_val"
)


def refuse_broken_weights(trainer: pl.Trainer, targets: Targets) -> None:
    """Refuse weights that are not finite.

    Raises:
        GradientError: A target has one that is not.
    """
    broken = [name for name, weight in targets.items() if not bool(torch.isfinite(local(weight)).all())]
    if broken:
        more = f" (and {len(broken) - 1} other targets)" if len(broken) > 1 else ""
        reason = _why(trainer, "before training. Load a sound checkpoint")
        raise GradientError(f"model: the weight {broken[0]!r}{more} is not finite (NaN or inf) {reason}.")


def refuse_broken_loss(
    trainer: pl.Trainer, module: pl.LightningModule, loss: Callable[[nn.Module, Any], Tensor], batch: Any
) -> None:
    """Refuse a loss that is not finite on any sample of a batch. Single samples may be: they are skipped, and counted.

    To be called inside `calibrating`.

    Raises:
        GradientError: It is finite on none.
    """
    size = batch_size(batch, default=1)
    singles = (slice_batch(batch, size, i, i + 1) for i in range(size))
    value = None
    for part in (batch, *(singles if size > 1 else ())):
        with torch.no_grad(), precision_context(trainer)():
            value = loss(module, part)
        if not isinstance(value, Tensor) or bool(torch.isfinite(value).all()):  # what is no tensor is refused elsewhere
            return
    reason = _why(trainer, "before training. Check calibration_step or training_step, the data, and the precision")
    if trainer.global_step and hasattr(module, "calibration_step"):
        reason += ". Or it is calibration_step that gives it: check it"
    raise GradientError(f"loss: it is {float(value.flatten()[0])} on a whole calibration batch {reason}.")  # type: ignore[union-attr]


def _why(trainer: pl.Trainer, untrained: str) -> str:
    return _TRAINED.format(steps=trainer.global_step) if trainer.global_step else untrained
