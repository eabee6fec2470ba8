"""A penalty on the units that are to be pruned, and on no others, as a term of the loss (Jiang et al. 2022, MaskSparsity)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_cap.errors import ConfigError
from lightning_cap.sparsity.unit_group import UnitGroup
from lightning_cap.sparsity.units import Units
from lightning_cap.utilities.arguments import require_flag, require_instance, shown


def unit_penalty(
    weights: Mapping[str, Tensor], units: Units, kept: Mapping[str, Tensor], shifts: bool = True
) -> Tensor:
    """What draws the units that are to be pruned to zero, a scalar to be added to the loss, times a small factor.

    Of a unit whose group passes norms, the sum of the absolute values (L1) of its scales and shifts in these, as Jiang et al.
    (2022) have it for the scales of batch norm. Of others, such as neurons and heads of a transformer, the L2 norm of all that
    makes the unit, rows and biases together (group lasso, Yuan & Lin 2006). Its gradient is zero for units that are kept.

    Args:
        weights: ``{name: parameter (*shape)}``, those of the units among them, such as ``dict(model.named_parameters())`` or the
            ``Targets`` of the units.
        units: All units of the model, of `Units.from_model`.
        kept: ``{group: bool (size)}``, False = to be pruned; groups that are not there are kept. Of the masks of a pruner,
            ``units.kept(result.masks)``.
        shifts: Draw the shifts of norms to zero too; a unit whose scale alone is zero still gives a constant. False for the paper's
            term.

    Raises:
        ConfigError: An argument is of the wrong kind, or weights and units are not of one model.
    """
    require_instance("weights", weights, Mapping, "dict(model.named_parameters())")
    require_instance("units", units, Units, "Units.from_model(model, example_input)")
    require_instance("kept", kept, Mapping, "units.kept(result.masks)")
    require_flag("shifts", shifts)
    for name in kept:
        if name not in units:
            raise ConfigError(
                f"kept={shown(kept)}: there is no group {shown(name)}. Give groups of {shown(list(units))}."
            )
    total = torch.zeros((), device=next((w.device for w in weights.values() if isinstance(w, Tensor)), None))
    for name, given in kept.items():
        group = units[name]
        if not isinstance(given, Tensor) or given.dtype != torch.bool or given.shape != (group.size,):
            raise ConfigError(f"kept={shown(kept)}: give {name!r} a bool tensor of shape {(group.size,)}, True = kept.")
        gone = ~given.cpu()
        if bool(gone.any()):
            total = total + _of_group(weights, group, gone, shifts).to(total.dtype)
    return total


def _of_group(weights: Mapping[str, Tensor], group: UnitGroup, gone: Tensor, shifts: bool) -> Tensor:
    norms = [part for part in group.norms if shifts or not part.name.endswith(".bias")]
    entries = []
    for part in norms or group.producers:
        weight = weights.get(part.name)
        if not isinstance(weight, Tensor):
            raise ConfigError(
                f"weights={shown(weights)}: there is no {part.name!r}, which units of {group.name!r} have. Give all."
            )
        index = part.index.cpu()[gone]
        lines = weight.index_select(part.dim, index.flatten().to(weight.device)).movedim(part.dim, 0)
        entries.append(lines.reshape(len(index), -1))
    both = torch.cat(entries, dim=1)  # (units that go, entries of each)
    return both.abs().sum() if norms else torch.linalg.vector_norm(both, dim=1).sum()
