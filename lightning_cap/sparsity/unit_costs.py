"""What the layers of a model compute, and which of their widths units change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_cap.sparsity.unit_group import Layer, UnitGroup, Width
from lightning_cap.utilities.flops import flop_counter

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def own_flops(model: nn.Module, forward: Callable[[], Any]) -> tuple[Any, dict[str, int], int]:
    """What ``forward`` returns, the FLOPs of each module less those of modules inside, and all FLOPs (2 for each multiply-add)."""
    with flop_counter() as counter:
        output = forward()
    counts = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}
    root = type(model).__name__
    inside = {name.removeprefix(root).removeprefix("."): n for name, n in counts.items() if name.startswith(root)}
    own = {path: inside[path] for path, _ in model.named_modules() if path in inside}
    for path in list(own):
        parent = path
        while path and parent:
            parent = parent.rpartition(".")[0]
            if parent in own:
                own[parent] -= inside[path]
                break
    return output, own, counter.get_total_flops()


def unit_layers(
    model: nn.Module, flops: Mapping[str, int], groups: Sequence[UnitGroup], cores: Mapping[str, str]
) -> list[Layer]:
    """Layers whose FLOPs depend on units.

    Args:
        model: The model.
        flops: ``{module: FLOPs of its own on one example}``.
        groups: Of units.
        cores: ``{module with heads: name of its group}``.
    """
    sizes = {group.name: group.size for group in groups}
    per_unit: dict[tuple[str, int], dict[str, int]] = {}
    for group in groups:
        for part in group.slices:
            entries = per_unit.setdefault((part.name, part.dim), {})
            entries[group.name] = entries.get(group.name, 0) + part.index.shape[1]
    layers = []
    for path, count in flops.items():
        module = model.get_submodule(path)
        widths = []
        if isinstance(module, _LAYERS):
            name = f"{path}.weight" if path else "weight"
            changed = [(size, per_unit.get((name, dim))) for dim, size in enumerate(module.weight.shape[:2])]
            widths = [Width(size, units) for size, units in changed if units]
        elif cores.get(path) in sizes:
            widths = [Width(sizes[cores[path]], {cores[path]: 1})]
        if count and widths:
            layers.append(Layer(path, count, tuple(widths)))
    return layers
