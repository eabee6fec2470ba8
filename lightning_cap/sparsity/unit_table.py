"""Lists groups of units, and says what is left as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_cap.sparsity.unit_group import Layer, UnitGroup

_NAMED = 3  # layers that are named of those that are left for one reason


@dataclass(frozen=True)
class UnitRecord:
    """A group of units in a table.

    Attributes:
        name: Of the group.
        kind: "head", "neuron" or "channel".
        units: How many.
        parameters: Weights of one unit in the dense model; None where that was not asked for.
        macs: Multiply-adds on one example that one unit takes in the dense model.
    """

    name: str
    kind: str
    units: int
    parameters: int | None
    macs: int


def unit_records(
    groups: Sequence[UnitGroup], layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...]] | None
) -> list[UnitRecord]:
    """A record for each group.

    Args:
        groups: Of units.
        layers: Whose cost depends on them.
        shapes: ``{parameter: shape}``; None to leave the weights out.
    """
    return [
        UnitRecord(
            group.name,
            group.kind,
            group.size,
            None if shapes is None else _weights_of_a_unit(group, shapes),
            round(sum(_share(layer, group.name) * layer.flops for layer in layers) / 2),
        )
        for group in groups
    ]


def _weights_of_a_unit(group: UnitGroup, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """What goes with the first unit; entries that are both its row and its column count once."""
    lengths: dict[str, list[int]] = {}
    for part in group.slices:
        left = lengths.setdefault(part.name, list(shapes[part.name]))
        left[part.dim] -= part.index.shape[1]
    return sum(math.prod(shapes[name]) - math.prod(left) for name, left in lengths.items())


def _share(layer: Layer, group: str) -> float:
    """Of a layer's cost, what one pruned unit saves."""
    return 1 - math.prod(width.length({group: 1}) / width.full for width in layer.widths)


def as_table(records: Sequence[UnitRecord]) -> str:
    """Lines of text, with a heading."""
    known = all(record.parameters is not None for record in records)
    heading = ["group", "kind", "units", *(["weights per unit"] if known else []), "MACs per unit"]
    lines = [[r.name, r.kind, f"{r.units}", *([f"{r.parameters:,}"] if known else []), f"{r.macs:,}"] for r in records]
    widths = [max(map(len, column)) for column in zip(heading, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [heading, *lines]
    )


def left_as_it_is(skipped: Mapping[str, str]) -> str:
    """``head (an output of the model), 12 layers (normalized over their channels: patch_embed.proj, ...)``."""
    layers: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        layers.setdefault(reason.partition(";")[0], []).append(name or "the model itself")
    return ", ".join(
        f"{names[0]} ({why})" if len(names) == 1 else f"{len(names)} layers ({why}: {_some(names)})"
        for why, names in layers.items()
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
