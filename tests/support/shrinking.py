"""Units made by hand, and models whose every entry matters, for the tests of what shrinks models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_cap.sparsity.units import Kind, Slice, UnitGroup, Units

Part = tuple[str, int]  # a parameter and the dim of it that units divide


def group(
    name: str, kind: Kind, size: int, producers: Sequence[Part], norms: Sequence[Part], consumers: Sequence[Part],
    shapes: Mapping[str, Sequence[int]], copies: Mapping[str, int] | None = None, buffers: Sequence[Part] = (),
) -> UnitGroup:  # fmt: skip
    """A group whose units divide each dim evenly; ``copies`` of a parameter lie one behind the other, as q, k and v do."""

    def part(name: str, dim: int) -> Slice:
        repeats = (copies or {}).get(name, 1)
        length = shapes[name][dim]
        index = torch.arange(length).view(repeats, size, -1).transpose(0, 1).reshape(size, -1)
        return Slice(name, dim, index)

    return UnitGroup(
        name, kind, size, *(tuple(part(*p) for p in parts) for parts in (producers, norms, consumers, buffers))
    )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all parameters and buffers."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def unsettle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and running statistic off its first value, so that none of them can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.2 if parameter.dim() < 2 else 0.02) * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.3 * torch.rand(buffer.shape, generator=generator)
    return model.eval()


def some_kept(units: Units, seed: int = 0, share: float = 0.5) -> dict[str, Tensor]:
    """Random units of each group, at least one; a single one in the first group."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for number, (name, members) in enumerate(units.items()):
        order = torch.randperm(members.size, generator=generator)
        left = 1 if number == 0 else max(1, int(members.size * share))
        kept[name] = torch.zeros(members.size, dtype=torch.bool)
        kept[name][order[:left]] = True
    return kept


@torch.no_grad()
def mask(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Zero what is masked, in place."""
    for name, parameter in model.named_parameters():
        if name in masks:
            parameter *= masks[name]
    return model
