"""What is pruned by default depends on the first and last layers: one forward pass tells them, without a trace in the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from textwrap import shorten
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_cap.calibration.batches import CalibrationBatches
from lightning_cap.sparsity.ends import Ends, ends_of
from lightning_cap.sparsity.layer_graph import Flow, trace
from lightning_cap.trainer.calibration import (
    calibrating,
    calibration_loss,
    calibration_source,
    precision_context,
    ready_batches,
    sample_order,
)
from lightning_cap.utilities import distributed, rng

_log = logging.getLogger(__name__)

T = TypeVar("T")

_SAMPLES = 8  # of the forward pass, at the most


def find_module_ends(trainer: pl.Trainer, module: pl.LightningModule, seed: int) -> Ends:
    """First and last layers of a module, by its calibration loss on a few samples of the calibration data.

    Every rank must call it. Where the loss cannot be had, the order of registration decides.

    Args:
        trainer: In ``fit``, with its training data, or in ``validate``.
        module: Its LightningModule.
        seed: First part of the key that samples are drawn by.
    """
    if not module.automatic_optimization and not hasattr(module, "calibration_step"):
        return Ends.registered(module, "automatic_optimization=False, and there is no calibration_step")

    return agree_on_ends(module, lambda: follow_a_batch(trainer, module, seed, lambda loss: trace(module, loss)))


def follow_a_batch(
    trainer: pl.Trainer, module: pl.LightningModule, seed: int, follow: Callable[[Callable[[], Any]], T]
) -> T | None:
    """Look at the calibration loss of a few samples, in eval mode, or where that fails in training mode, as detectors need it.

    Args:
        trainer: As for `find_module_ends`.
        module: Its LightningModule.
        seed: As for `find_module_ends`.
        follow: Is given what computes the loss, and says what is to be returned.

    Returns:
        None if this rank has no batch.
    """
    with calibrating(trainer, module), precision_context(trainer)(), torch.inference_mode(False):
        batch = next(few_samples(trainer, module, seed), None)
        loss = calibration_loss(module)
        if batch is None:
            return None
        try:
            return follow(lambda: loss(module, batch))
        except Exception:
            _log.debug("No forward pass in eval mode; trying in training mode.", exc_info=True)
            module.train()  # until the state is put back
            return follow(lambda: loss(module, batch))


def agree_on_ends(model: nn.Module, follow: Callable[[], Flow | None]) -> Ends:
    """The ends by the forward passes of all ranks together; by the order of registration if one fails, and the summary says so.

    Every rank must call it.

    Args:
        model: Any module.
        follow: Does this rank's forward pass; None if it has no batch.
    """
    flow, failure = None, ""
    try:
        flow = follow()
    except Exception as error:  # of the user's model or data; the dry run raises it again where gradients are needed
        failure = shorten(f"{type(error).__name__}: {error}", 200)
    told = distributed.gather_objects((flow, failure))
    failures = [why for _, why in told if why]
    flows = [found for found, _ in told if found is not None]
    if flows and not failures:
        return ends_of(model, flows)
    why = f"the forward pass failed ({failures[0]})" if failures else "there is no batch for a forward pass"
    return Ends.registered(model, why)


def few_samples(trainer: pl.Trainer, module: pl.LightningModule, seed: int) -> Iterator[Any]:
    """One small batch for each rank. To be called inside `calibrating`; arguments: see `find_module_ends`."""
    key = (seed, 0)
    source = calibration_source(trainer, module)
    order = sample_order(trainer, source)
    size = CalibrationBatches(source, 1, 1, *key, _SAMPLES, order).batch_size
    batches = CalibrationBatches(source, size * distributed.world_size(), 1, *key, _SAMPLES, order)
    return ready_batches(trainer, module, batches, (*key, rng.Domain.COMPUTE))
