"""Averaged copies of the weights (Lightning's `WeightAveraging`): re-initialised at an event, masked ever after."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_cap.healing.batchnorm import batch_norms
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.trainer.compat import averaged_models, averages_at_end


@torch.no_grad()
def restart_averages(trainer: pl.Trainer, module: nn.Module) -> None:
    """Make every average begin anew from the weights that the model has now."""
    for average in averaged_models(trainer):
        _copy(module, getattr(average, "module", average))
        if isinstance(getattr(average, "n_averaged", None), torch.Tensor):
            average.n_averaged.zero_()  # type: ignore[operator]


@torch.no_grad()
def take_averages(trainer: pl.Trainer, module: nn.Module) -> None:
    """Put the averages that Lightning ends a run with into the model now, whether or not it has done so already."""
    for average in averages_at_end(trainer):
        _copy(getattr(average, "module", average), module)


@torch.no_grad()
def update_averages(trainer: pl.Trainer, module: nn.Module, restart: bool, renew: bool) -> None:
    """Bring every average in line with the model after an event.

    Args:
        trainer: Whose callbacks average.
        module: With the weights after the event.
        restart: Begin anew from the weights that the model has now, and all else in it.
        renew: Else go on, but with the statistics of batch norm that the model has now: those of older weights do not fit.
    """
    if restart:
        restart_averages(trainer, module)
        return
    for average in averaged_models(trainer) if renew else ():
        own, theirs = batch_norms(module), batch_norms(getattr(average, "module", average))
        for name, layer in own.items():
            for kind in ("running_mean", "running_var"):
                getattr(theirs[name], kind).copy_(getattr(layer, kind))


def mask_averages(trainer: pl.Trainer, masks: MaskSet) -> None:
    """Set masked weights to zero in every average."""
    for average in averaged_models(trainer):
        masks.apply_to_copy(getattr(average, "module", average))


def _copy(source: nn.Module, target: nn.Module) -> None:
    """Parameters and buffers."""
    for given, taken in ((source.parameters(), target.parameters()), (source.buffers(), target.buffers())):
        for value, place in zip(given, taken, strict=True):
            place.copy_(value)
