"""Which units of a model were kept when it was shrunk: what a smaller model remembers, and what is written beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, cast

import torch
from torch import Tensor

from lightning_cap.errors import DataError
from lightning_cap.sparsity.units import Kind, Slice, UnitGroup, Units
from lightning_cap.utilities.records import Plain, Record

#: The attribute of a smaller model that says how it was made, a tuple of `ShrinkStep`.
STEPS = "shrink_steps"


@dataclass(frozen=True)
class KeptSlice:
    """A `Slice` in plain values.

    Attributes:
        name: Of the parameter or buffer.
        dim: That the units divide.
        runs: ``(first, length)`` of consecutive entries; one behind the other, they are the entries of all units in turn.
    """

    name: str
    dim: int
    runs: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, part: Slice) -> KeptSlice:
        """The plain values of a slice."""
        flat = part.index.flatten().cpu()
        ends = [0, *((flat.diff() != 1).nonzero().flatten() + 1).tolist(), len(flat)]
        runs = tuple((int(flat[a]), b - a) for a, b in pairwise(ends))
        return cls(part.name, part.dim, runs)

    def slice(self, size: int) -> Slice:
        """The slice of so many units."""
        flat = torch.cat([torch.arange(first, first + length) for first, length in self.runs])
        if self.dim < 0 or bool((flat < 0).any()):
            raise ValueError(f"negative entries of {self.name}")
        return Slice(self.name, self.dim, flat.view(size, -1))


@dataclass(frozen=True)
class KeptGroup:
    """A group of units of which some are gone.

    Attributes:
        name: Of the group.
        kind: ``"head"``, ``"neuron"`` or ``"channel"``.
        size: Units that there were.
        kept: Those that are left, from 0.
        producers: As of `UnitGroup`.
        norms: As of `UnitGroup`.
        consumers: As of `UnitGroup`.
        buffers: As of `UnitGroup`.
    """

    name: str
    kind: str
    size: int
    kept: tuple[int, ...]
    producers: tuple[KeptSlice, ...]
    norms: tuple[KeptSlice, ...]
    consumers: tuple[KeptSlice, ...]
    buffers: tuple[KeptSlice, ...]


_ROLES = ("producers", "norms", "consumers", "buffers")


@dataclass(frozen=True)
class ShrinkStep:
    """What was cut at once.

    Attributes:
        groups: Those that lost units.
    """

    groups: tuple[KeptGroup, ...]

    @classmethod
    def of(cls, units: Units, kept: Mapping[str, Tensor]) -> ShrinkStep:
        """Of the units that are not in ``kept``, bool by group."""
        return cls(
            tuple(
                KeptGroup(
                    name=name,
                    kind=group.kind,
                    size=group.size,
                    kept=tuple(int(unit) for unit in kept[name].nonzero().flatten()),
                    **{role: tuple(KeptSlice.of(part) for part in getattr(group, role)) for role in _ROLES},
                )
                for name, group in units.items()
                if not bool(kept[name].all())
            )
        )

    def restore(self) -> tuple[Units, dict[str, Tensor]]:
        """The units, and which of them are kept, bool by group.

        Raises:
            DataError: The numbers do not fit together.
        """
        try:
            groups, kept = [], {}
            for group in self.groups:
                parts = {role: tuple(part.slice(group.size) for part in getattr(group, role)) for role in _ROLES}
                groups.append(UnitGroup(group.name, cast("Kind", group.kind), group.size, **parts))
                kept[group.name] = torch.zeros(group.size, dtype=torch.bool)
                kept[group.name][list(group.kept)] = True
            return Units(groups), kept
        except (ValueError, RuntimeError, IndexError) as error:
            raise DataError(f"its units are damaged ({type(error).__name__}: {error})") from error


@dataclass(frozen=True, kw_only=True)
class ShrunkRecord(Record):
    """How to make a model of the shape that the weights beside it have.

    Attributes:
        architecture: timm's name of the model, empty for others.
        model_args: What `timm.create_model` was given besides.
        steps: The cuts, one after the other.
    """

    kind: ClassVar[str] = "shrunk"
    version: ClassVar[int] = 1

    architecture: str
    model_args: Mapping[str, Plain | tuple[Plain, ...]]
    steps: tuple[ShrinkStep, ...]
