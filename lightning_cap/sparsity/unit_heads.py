"""Heads of attention: which modules have some, and which channels belong to each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from lightning_cap.sparsity.unit_graph import Side
from lightning_cap.sparsity.unit_layers import entries_of, makes_channels


@dataclass
class Attention:
    """A module with heads.

    Attributes:
        name: Of the module.
        num_heads: Its heads.
        layers: Ids of the layers inside; those of modules inside that have heads themselves are left out.
        tables: Parameters inside, outside all layers, of which one dim counts heads: ``{name: dim}``.
    """

    name: str
    num_heads: int
    layers: set[int] = field(default_factory=set)
    tables: dict[str, int] = field(default_factory=dict)


def attentions(model: nn.Module) -> list[Attention]:
    """Modules with an integer ``num_heads``."""
    found = {name: Attention(name, heads) for name, module in model.named_modules() if (heads := _num_heads(module))}
    for path, module in model.named_modules():
        inside = [name for name in found if path == name or path.startswith(f"{name}." if name else "")]
        if not inside:
            continue
        owner = found[max(inside, key=len)]
        owner.layers.add(id(module))
        if path != owner.name and entries_of(module, "out")[0]:
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            dims = [dim for dim, size in enumerate(parameter.shape) if size == owner.num_heads]
            owner.tables |= {name: dims[0]} if len(dims) == 1 else {}
    return list(found.values())


def _num_heads(module: nn.Module) -> int:
    number = getattr(module, "num_heads", None)
    if not isinstance(number, int) or isinstance(number, bool) or isinstance(module, nn.MultiheadAttention):
        return 0
    return max(number, 0)


def join_heads(
    sides: Sequence[Side], heads: Iterable[Attention], attended: Collection[int], blocked: dict[int, str]
) -> dict[int, Attention]:
    """Give all channels of a head one label.

    Args:
        sides: Whose labels are changed.
        heads: Modules with heads.
        attended: Labels of channels that pass attention.
        blocked: ``{label: why it cannot be pruned}``; added to.

    Returns:
        ``{label: its attention}``.
    """
    head_of: dict[int, Attention] = {}
    for attention in heads:
        inside = [side for side in sides if id(side.owner) in attention.layers]
        outside = {
            int(n)
            for s in sides
            if isinstance(s.owner, nn.Module) and id(s.owner) not in attention.layers
            for n in s.labels
        }
        for reader in (side for side in inside if side.way == "in"):
            own = set(map(int, reader.labels))
            parts = [s for s in inside if s is reader or own.intersection(map(int, s.labels))]
            rows = sum(len(s.labels) for s in parts if s.way == "out" and makes_channels(s.owner))
            if own & (outside | {-1}) or rows <= len(reader.labels) or own.isdisjoint(attended):
                continue  # it reads what others read too, or what one layer alone makes: no output of attention
            if any(len(side.labels) % attention.num_heads for side in parts):
                blocked |= dict.fromkeys(own, "its heads have no common size")
                continue
            reasons = [blocked[label] for label in own if label in blocked]
            labels = _join(sides, reader, parts, attention.num_heads)
            blocked |= dict.fromkeys(labels, reasons[0]) if reasons else {}
            head_of |= dict.fromkeys(labels, attention)
    return head_of


def _join(sides: Sequence[Side], reader: Side, parts: Sequence[Side], num_heads: int) -> list[int]:
    """One label for all that goes with the columns of a head; where that is all heads, each layer is cut into equal parts."""
    columns = reader.labels.reshape(num_heads, -1)
    if len(np.unique(columns)) == columns.size and not any(side.reshaped for side in parts):
        joined = np.arange(1 + max(int(side.labels.max()) for side in sides))
        for head in columns:
            joined[head] = head.min()
        for side in sides:
            side.labels = np.where(side.labels < 0, -1, joined[side.labels])
        return [int(head.min()) for head in columns]
    first = 1 + max(int(side.labels.max()) for side in sides)
    for side in parts:
        side.labels = first + np.arange(len(side.labels)) // (len(side.labels) // num_heads)
        side.reshaped = False
    return list(range(first, first + num_heads))
