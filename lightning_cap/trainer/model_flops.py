"""FLOPs of the model inside a LightningModule, counted without a trace in the run."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import lightning.pytorch as pl
import torch

from lightning_cap.calibration.batches import batch_size, slice_batch
from lightning_cap.sparsity.flops import ModelFlops, model_flops
from lightning_cap.trainer.calibration import calibrating, calibration_loss, precision_context
from lightning_cap.trainer.ends import few_samples
from lightning_cap.trainer.units import feed

_log = logging.getLogger(__name__)


def count_flops(trainer: pl.Trainer, module: pl.LightningModule, seed: int) -> ModelFlops | None:
    """FLOPs of the model that has all weights of a module that train, on one sample of the calibration data.

    Every rank must call it: each runs the calibration loss once, to see what the model is given. Where that calls parts of the
    model, but never it as a whole, all that the loss computes is counted, a teacher of a distillation included.

    Args:
        trainer: In ``fit``, with its training data, or in ``validate``.
        module: Its LightningModule. Names are those in it.
        seed: First part of the key that samples are drawn by.

    Returns:
        None where they cannot be counted: there is no batch, the loss fails, or is only to be had with steps of manual
        optimization.
    """
    if not module.automatic_optimization and not hasattr(module, "calibration_step"):
        return None
    try:
        return _of_inner_model(trainer, module, seed)
    except (
        Exception
    ):  # of the user's model or data; it is a number for tables, and what is wrong is told where it matters
        _log.debug("The FLOPs of the model cannot be counted by itself; trying by the loss.", exc_info=True)
    try:
        return _of_loss(trainer, module, seed)
    except Exception:
        _log.debug("The FLOPs of the model cannot be counted.", exc_info=True)
    return None


def _of_inner_model(trainer: pl.Trainer, module: pl.LightningModule, seed: int) -> ModelFlops | None:
    """Of one sample, exactly."""
    fed = feed(trainer, module, seed)
    if not fed.inputs:
        return None
    inputs = slice_batch(fed.inputs, batch_size(fed.inputs), 0, 1)
    with calibrating(trainer, module), precision_context(trainer)(), torch.inference_mode(False):
        counted = model_flops(
            fed.model, lambda: fed.model(**inputs) if isinstance(inputs, Mapping) else fed.model(*inputs)
        )
    return ModelFlops({fed.prefix + name: flops for name, flops in counted.layers.items()}, counted.total)


def _of_loss(trainer: pl.Trainer, module: pl.LightningModule, seed: int) -> ModelFlops | None:
    """Where a training step calls the parts of the model: of all that it computes, on average."""
    with calibrating(trainer, module), precision_context(trainer)(), torch.inference_mode(False):
        batch = next(few_samples(trainer, module, seed), None)
        loss = calibration_loss(module)
        return None if batch is None else model_flops(module, lambda: loss(module, batch), batch_size(batch))
