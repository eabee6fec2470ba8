"""FLOPs of the model inside a LightningModule, without a trace in the run."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_cap.calibration.batches import batch_size, slice_batch
from lightning_cap.sparsity.flops import ModelFlops, model_flops
from lightning_cap.trainer.calibration import step_arguments, to_device
from lightning_cap.trainer.evaluation import validation_loaders
from lightning_cap.trainer.isolation import in_stage, preserve_state, suppress_logging
from lightning_cap.utilities import distributed


def module_flops(trainer: pl.Trainer, module: pl.LightningModule) -> ModelFlops | None:
    """FLOPs of a validation step on one example; names are those of `Targets` of the module. Every rank must call it.

    Args:
        trainer: In ``fit`` or ``validate``.
        module: Its LightningModule.

    Returns:
        None if there is nothing to validate with.

    Raises:
        ConfigError: The step fails, or has nothing to count.
    """
    loaders = validation_loaders(trainer)
    if not loaders:
        return None
    with (
        distributed.raise_on_all_ranks("Counting FLOPs"),
        preserve_state(module),
        suppress_logging(module),
        in_stage(trainer, RunningStage.VALIDATING),
    ):
        batch, examples = _one_example(to_device(trainer, module, next(iter(loaders[0]))))
        arguments = step_arguments(module.validation_step, batch, 0, 0)
        return model_flops(module, lambda: module.validation_step(*arguments), examples)


def _one_example(batch: Any) -> tuple[Any, int]:
    """The first example of a batch, where all in it is by examples; else the batch, and how many it has."""
    size = batch_size(batch, default=1)
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    if all(tensor.dim() and len(tensor) == size for tensor in tensors):
        return slice_batch(batch, size, 0, 1), 1
    return batch, size
