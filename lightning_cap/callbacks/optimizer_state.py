"""The optimizer's state of masked weights and of regrown ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.sharded import local


@torch.no_grad()
def sync_optimizer_state(
    optimizer: Optimizer, targets: Targets, masks: MaskSet, grown: Mapping[str, Tensor], *, reset_momentum: bool = False
) -> None:
    """Bring an optimizer in line with the masks after an event.

    State of masked weights is zero. A regrown weight has that of a new one: what can be negative (first moments,
    momentum, slow copies) is zero; what cannot (second moments and the like) is the mean over the weights of the target that
    were kept. If it were zero too, late in training, when the correction of its bias is over, Adam's first steps would be
    several times the learning rate.

    Args:
        optimizer: Of the run; only state of a target's own shape is changed.
        targets: The weights.
        masks: In force now.
        grown: The regrown weights, as `MaskSet.replace` tells them.
        reset_momentum: A sparse phase begins (see `sparse_phases`), and the momentum of the dense one is stale: set momentum
            and first moments of all targets to zero; second moments stay.
    """
    masks.apply_to_optimizer(optimizer)
    stayed = {n: local(mask) & ~local(grown[n]) if n in grown else local(mask) for n, mask in masks.items()}
    for entries in _entries(optimizer, targets).values():
        if _is_scale(entries):
            _fill_with_means(entries, stayed, grown)
        elif reset_momentum:
            torch._foreach_zero_(list(entries.values()))
        else:
            for name in entries.keys() & grown.keys():
                entries[name].masked_fill_(local(grown[name]).to(entries[name].device), 0.0)


def _fill_with_means(entries: Mapping[str, Tensor], stayed: Mapping[str, Tensor], grown: Mapping[str, Tensor]) -> None:
    """Give regrown weights the mean over those of their target that stayed, or over all targets' if none did."""
    kept = {name: entry[stayed[name].to(entry.device)] for name, entry in entries.items()}
    for name in entries.keys() & grown.keys():
        mean = _mean([kept[name]] if kept[name].numel() else list(kept.values()))
        entries[name].masked_fill_(grown[name].to(entries[name].device), mean)


def _entries(optimizer: Optimizer, targets: Targets) -> dict[str, dict[str, Tensor]]:
    """``{key of the state: {target: (*shape)}}``; of sharded targets what this process holds."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in targets.items():
        for key, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor) and value.shape == weight.shape and value.is_floating_point():
                found.setdefault(key, {})[name] = local(value)
    return found


def _is_scale(entries: Mapping[str, Tensor]) -> bool:
    """Whether a kind of state is one of magnitudes, such as second moments: over all targets, none is negative."""
    return all(bool((entry >= 0).all()) for entry in entries.values())


def _mean(values: list[Tensor]) -> float:
    count = sum(value.numel() for value in values)
    return sum(float(value.sum(dtype=torch.float64)) for value in values) / count if count else 0.0
