"""Averaged copies of the weights (Lightning's `WeightAveraging`): re-initialised at an event, masked ever after."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.trainer.compat import averaged_models


@torch.no_grad()
def restart_averages(trainer: pl.Trainer, module: nn.Module) -> None:
    """Make every average begin anew from the weights that the model has now."""
    for average in averaged_models(trainer):
        copy = getattr(average, "module", average)
        for mine, theirs in ((module.parameters(), copy.parameters()), (module.buffers(), copy.buffers())):
            for source, target in zip(mine, theirs, strict=True):
                target.copy_(source)
        if isinstance(getattr(average, "n_averaged", None), torch.Tensor):
            average.n_averaged.zero_()  # type: ignore[operator]


def mask_averages(trainer: pl.Trainer, masks: MaskSet) -> None:
    """Set masked weights to zero in every average."""
    for average in averaged_models(trainer):
        masks.apply_to_copy(getattr(average, "module", average))
