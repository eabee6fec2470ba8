"""Turns channels that go together into groups of units: heads, neurons and channels, with names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from lightning_cap.sparsity.unit_graph import ChannelGraph, Indices, Side
from lightning_cap.sparsity.unit_group import Kind, Slice, UnitGroup
from lightning_cap.sparsity.unit_heads import Attention, join_heads
from lightning_cap.sparsity.unit_layers import (
    entries_of,
    is_norm,
    is_normalized_over_channels,
    makes_channels,
    role_of,
    why_fixed,
)
from lightning_cap.utilities.compiled import plain_name


@dataclass
class Candidates:
    """Groups that the graph allows.

    Attributes:
        groups: By name, in the order of the forward pass.
        normalized: Names of those that pass a LayerNorm over their channels.
        skipped: ``{layer: why its width is not pruned}``.
        cores: ``{module with heads: name of its group}``.
        makers: ``{group: layers whose outputs its units are}``.
    """

    groups: dict[str, UnitGroup] = field(default_factory=dict)
    normalized: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    cores: dict[str, str] = field(default_factory=dict)
    makers: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class _Bundle:
    """Units of one group: the same ends of the same layers have as many entries of each."""

    places: list[tuple[int, int]]  # side, entries of a unit
    units: list[dict[int, Indices]]  # side -> its entries of a unit
    reason: str
    head: Attention | None = None


class GroupBuilder:
    """Makes groups of a graph.

    Args:
        model: The model that was traced.
        graph: Of its channels.
        heads: Its modules with heads.
        order: Layers as they were called, by name.
        fixed: ``{id of a parameter or module: why it cannot be cut}``.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        heads: Sequence[Attention],
        order: Sequence[str],
        fixed: Mapping[int, str],
    ) -> None:
        self._names: dict[int, str] = {id(m): plain_name(path) for path, m in model.named_modules()}
        self._names |= {id(p): plain_name(path) for path, p in model.named_parameters()}
        place = {name: i for i, name in enumerate(order)}
        self._sides = sorted(graph.sides, key=lambda s: place.get(self._names[id(s.owner)], len(place)))
        self._blocked, self._attended, self._heads, self._fixed = dict(graph.blocked), graph.attended, heads, fixed
        self._kept_layers: set[str] = set()

    def build(self) -> Candidates:
        """All groups."""
        self._block()
        head_of = join_heads(self._sides, self._heads, self._attended, self._blocked)
        for side in (side for side in self._sides if side.reshaped):
            self._blocked |= {int(label): "its channels are reshaped" for label in side.labels if label >= 0}
        found = Candidates()
        bundles = self._bundles(head_of)
        usable = []
        for bundle in bundles:
            reason = bundle.reason or self._why_not(bundle)
            if reason:
                for name in self._makers(bundle):
                    found.skipped.setdefault(name, reason)
            else:
                usable.append(bundle)
        for name, bundle in zip(self._group_names(usable), usable, strict=True):
            found.groups[name] = self._group(name, bundle)
            if any(is_normalized_over_channels(self._sides[side].owner) for side, _ in bundle.places):
                found.normalized.add(name)
            if bundle.head is not None:
                found.cores[bundle.head.name] = name
            found.makers[name] = self._makers(bundle)
            for maker in found.makers[name]:
                found.skipped.pop(maker, None)
        return found

    def _block(self) -> None:
        for side in self._sides:
            reason = why_fixed(side.owner) or self._why_parameters_are_fixed(side)
            if reason:
                self._blocked |= {int(label): reason for label in side.labels if label >= 0}

    def _why_parameters_are_fixed(self, side: Side) -> str:
        if isinstance(side.owner, nn.Parameter):
            return self._fixed.get(id(side.owner), "")
        owned = [getattr(side.owner, name) for name in entries_of(side.owner, side.way)[0]]
        return next((self._fixed[id(o)] for o in (side.owner, *owned) if id(o) in self._fixed), "")

    def _bundles(self, head_of: Mapping[int, Attention]) -> list[_Bundle]:
        units: dict[int, dict[int, Indices]] = {}
        for number, side in enumerate(self._sides):
            order = np.argsort(side.labels, kind="stable")
            labels, starts = np.unique(side.labels[order], return_index=True)
            for label, entries in zip(labels, np.split(order, starts[1:]), strict=True):
                if label >= 0:
                    units.setdefault(int(label), {})[number] = entries
        bundles: dict[object, _Bundle] = {}
        for label, places in units.items():
            shape = [(number, len(entries)) for number, entries in places.items()]
            key = (tuple(shape), self._blocked.get(label, ""), id(head_of.get(label)))
            bundle = bundles.setdefault(key, _Bundle(shape, [], self._blocked.get(label, ""), head_of.get(label)))
            bundle.units.append(places)
        for bundle in bundles.values():
            last = bundle.places[-1][0]
            bundle.units.sort(key=lambda unit: int(unit[last][0]))
        return list(bundles.values())

    def _makers(self, bundle: _Bundle) -> list[str]:
        """Layers whose outputs are the units."""
        sides = [self._sides[number] for number, _ in bundle.places]
        return [self._names[id(s.owner)] for s in sides if s.way == "out" and makes_channels(s.owner)]

    def _readers(self, bundle: _Bundle) -> list[str]:
        sides = [self._sides[number] for number, _ in bundle.places]
        return [self._names[id(s.owner)] for s in sides if s.way == "in"]

    def _why_not(self, bundle: _Bundle) -> str:
        if not self._makers(bundle):
            return "an input of the model"
        if not self._readers(bundle):
            return "no layer reads it"
        if bundle.head is not None and len(bundle.units) != bundle.head.num_heads:
            return "its heads depend on each other"
        return "a single unit" if len(bundle.units) < 2 else ""

    def _group(self, name: str, bundle: _Bundle) -> UnitGroup:
        roles: dict[str, list[Slice]] = {"producers": [], "norms": [], "consumers": [], "buffers": []}
        for number, _ in bundle.places:
            side = self._sides[number]
            index = torch.from_numpy(np.stack([unit[number] for unit in bundle.units]))
            own = self._names[id(side.owner)]
            if isinstance(side.owner, nn.Parameter):
                roles["norms" if side.scales else "producers"].append(Slice(own, side.dim, index))
                continue
            prefix = f"{own}." if own else ""
            dims, buffers = entries_of(side.owner, side.way)
            roles[role_of(side.owner, side.way)] += [Slice(prefix + n, dim, index) for n, dim in dims.items()]
            roles["buffers"] += [Slice(prefix + n, 0, index) for n in buffers]
        if bundle.head is not None:
            every = torch.arange(bundle.head.num_heads).unsqueeze(1)
            roles["producers"] += [Slice(plain_name(n), dim, every) for n, dim in bundle.head.tables.items()]
        slices = {role: tuple(found) for role, found in roles.items()}
        return UnitGroup(name, self._kind(bundle), len(bundle.units), **slices)

    def _kind(self, bundle: _Bundle) -> Kind:
        if bundle.head is not None:
            return "head"
        owners = [self._sides[number].owner for number, _ in bundle.places]
        spatial = any(isinstance(o, nn.modules.conv._ConvNd) and max(o.kernel_size) > 1 for o in owners)
        hidden = len(self._readers(bundle)) == 1 and not any(is_norm(o) for o in owners)
        return "neuron" if hidden and not spatial else "channel"

    def _group_names(self, bundles: Sequence[_Bundle]) -> list[str]:
        names = [self._wanted_name(bundle) for bundle in bundles]
        firsts = [self._makers(bundle)[0] for bundle in bundles]
        names = [first if names.count(name) > 1 else name for name, first in zip(names, firsts, strict=True)]
        return [f"{name}.{names[:i].count(name)}" if name in names[:i] else name for i, name in enumerate(names)]

    def _wanted_name(self, bundle: _Bundle) -> str:
        makers = self._makers(bundle)
        if bundle.head is not None:
            return plain_name(bundle.head.name) or "heads"
        if self._kind(bundle) == "neuron" and (parent := _common_parent([*makers, *self._readers(bundle)])):
            return parent
        if len(makers) == 1:
            return makers[0]
        return f"{_common_parent(makers) or makers[0]}.stream"


def _common_parent(names: Sequence[str]) -> str:
    """``"blocks.0.mlp"`` of ``"blocks.0.mlp.fc1"`` and ``"blocks.0.mlp.fc2"``; empty where it is the model itself."""
    paths = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(path) > shared and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return ".".join(paths[0][:shared])
