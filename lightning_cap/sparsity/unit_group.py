"""What goes together when a unit is pruned: slices of parameters, the group they compete in, and the widths that depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["head", "neuron", "channel"]


@dataclass(frozen=True, eq=False)
class Slice:
    """Entries along one dim of a parameter or buffer that belong to the units of a group.

    Attributes:
        name: Of the parameter or buffer, as in the model.
        dim: The dim that the units divide.
        index: int64 ``(units, width)``: row ``u`` has the entries of unit ``u`` along the dim.
    """

    name: str
    dim: int
    index: Tensor

    def entries(self, units: Tensor) -> Tensor:
        """Sorted entries ``(n,)`` along the dim of the units where ``units``, bool ``(size,)``, is True."""
        return self.index[units.to(self.index.device)].flatten().sort().values


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units of which any may be pruned alone; they are the width of one layer, or of one residual stream.

    Attributes:
        name: Of the module that makes them, e.g. ``"blocks.0.mlp.fc1"``.
        kind: What a unit is.
        size: Number of units.
        producers: Rows, biases, tables and other parameters that make a unit.
        norms: Scales and shifts that a unit passes.
        consumers: Columns of the weights that read a unit.
        buffers: Running statistics; never masked, but cut when the model is shrunk.
    """

    name: str
    kind: Kind
    size: int
    producers: tuple[Slice, ...]
    norms: tuple[Slice, ...]
    consumers: tuple[Slice, ...]
    buffers: tuple[Slice, ...] = ()

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Of parameters: all that is masked when a unit is pruned."""
        return self.producers + self.norms + self.consumers

    @property
    def gates(self) -> tuple[Slice, ...]:
        """Where a gate on the unit's output can be read off the gradients of weights (``g_u = Σ w_i g_i``).

        Where several layers read it, the scales and shifts of the norm that it passes; else the columns of all that read it, or
        where nothing does, what makes it. Several norms may be passed one after the other, where each would be a gate.
        """
        if len(self.consumers) > 1 and len({part.name.rpartition(".")[0] for part in self.norms}) == 1:
            return self.norms
        return self.consumers or self.norms or self.producers


@dataclass(frozen=True)
class Width:
    """How a layer's width depends on units: ``full`` entries, less ``per_unit[group]`` for each unit of a group that is pruned."""

    full: int
    per_unit: Mapping[str, int]

    def length(self, pruned: Mapping[str, int]) -> int:
        """Entries that are left when so many units of each group are pruned."""
        return self.full - sum(width * pruned.get(group, 0) for group, width in self.per_unit.items())


@dataclass(frozen=True)
class Layer:
    """A part of the model whose cost is proportional to widths.

    Attributes:
        name: Of the module.
        flops: On one example, in the dense model: 2 for each multiply-add.
        widths: Of its inputs, outputs or heads, those that units change.
    """

    name: str
    flops: int
    widths: tuple[Width, ...]
