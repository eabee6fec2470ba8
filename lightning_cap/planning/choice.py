"""What is pruned of a model and what is not, as a record."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_cap.errors import CAPError
from lightning_cap.export.batches import Inputs, call
from lightning_cap.planning.run_plan import ChoicePlan
from lightning_cap.sparsity.flops import model_flops
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.run_records import LayerRecord
from lightning_cap.utilities.compiled import plain_name


def choice_of(module: nn.Module, targets: Targets, flops: Mapping[str, int]) -> ChoicePlan:
    """What `Targets` prune of a model.

    Args:
        module: The model.
        targets: What is pruned.
        flops: Of each parameter's layer, as far as known.
    """
    shapes = {plain_name(name): tuple(weight.shape) for name, weight in module.named_parameters()}
    layers = [LayerRecord(name, shape, "", flops.get(name)) for name, shape in targets.shapes.items()]
    for name, why in targets.dense.items():
        layers.append(LayerRecord(name, shapes.get(name, ()), why, flops.get(name)))
    known = {layer.name for layer in layers}
    others = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name not in known)
    ends = targets.ends
    return ChoicePlan(
        tuple(layers),
        sum(torch.Size(shape).numel() for shape in shapes.values()),
        targets.numel,
        others,
        "" if targets.units is None else targets.units.summary,
        "" if ends is None or not ends.by_order else f"first and last by order of registration: {ends.by_order}",
    )


def layer_flops(module: pl.LightningModule, inputs: Inputs) -> dict[str, int]:
    """FLOPs of each parameter's layer on one example; nothing where the model cannot be run so.

    Args:
        module: Takes them.
        inputs: Of one sample: a tensor, or a dict of named ones.
    """
    try:
        return dict(model_flops(module, lambda: call(module, inputs)).layers)
    except CAPError:
        return {}
