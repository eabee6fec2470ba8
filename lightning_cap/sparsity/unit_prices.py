"""What a model costs when only so many units of each group are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lightning_cap.sparsity.units import Units, Width


class Term(Protocol):
    """A part of the price that depends on some groups alone.

    Attributes:
        groups: Names of those groups.
    """

    @property
    def groups(self) -> Sequence[str]:
        """Names of the groups."""

    def price(self, pruned: Mapping[str, int]) -> float:
        """With so many units of each group pruned; groups that are not there have all."""


@dataclass(frozen=True)
class ProductTerm:
    """``each`` times the lengths of some widths: weights of a tensor, FLOPs of a layer."""

    each: float
    widths: tuple[Width, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """Those of all widths."""
        return tuple(dict.fromkeys(group for width in self.widths for group in width.per_unit))

    def price(self, pruned: Mapping[str, int]) -> float:
        """See `Term`."""
        return self.each * math.prod(width.length(pruned) for width in self.widths)


class UnitPrices:
    """The price of a model as a sum of terms.

    Args:
        units: The units.
        terms: Parts that depend on groups.
        constant: What does not.
        total: Price of the model with all units. Default: the sum.
        unit: Of a price, for logs, e.g. ``"ms"``.

    Attributes:
        total: Price of the model with all units.
    """

    def __init__(self, units: Units, terms: Sequence[Term], constant: float = 0.0, unit: str = "") -> None:
        self._sizes, self._terms, self._constant, self.unit = units.sizes, tuple(terms), constant, unit
        self._of_group: dict[str, list[Term]] = {name: [] for name in units}
        for term in self._terms:
            for group in term.groups:
                self._of_group[group].append(term)
        self.total = self.of(self._sizes)

    def of(self, kept: Mapping[str, int]) -> float:
        """Price with so many units of each group kept."""
        pruned = self._pruned(kept)
        return self._constant + math.fsum(term.price(pruned) for term in self._terms)

    def saving(self, kept: Mapping[str, int], group: str) -> float:
        """What one more pruned unit of ``group`` saves where so many of each group are kept."""
        pruned = self._pruned(kept)
        more = pruned | {group: pruned[group] + 1}
        return math.fsum(term.price(pruned) - term.price(more) for term in self._of_group[group])

    def saved_share(self, kept: Mapping[str, int]) -> float:
        """What is saved, over the total."""
        return (self.total - self.of(kept)) / self.total

    def least(self) -> float:
        """Price with one unit of each group left."""
        return self.of(dict.fromkeys(self._sizes, 1))

    def summary(self, goals: Sequence[float] = ()) -> str:
        """What is predicted of goals: ``45.2 ms dense, 22.6 ms at goal 0.5``.

        Args:
            goals: Shares of the total that are to be saved.
        """
        known = [(self.total, "dense"), *((self.total * (1 - goal), f"at goal {goal:g}") for goal in goals)]
        return ", ".join(f"{price:.4g} {self.unit or 'weights'} {where}" for price, where in known)

    def neighbours(self, group: str) -> set[str]:
        """Groups whose savings a pruned unit of ``group`` changes, itself included."""
        return {group}.union(*(term.groups for term in self._of_group[group]))

    def _pruned(self, kept: Mapping[str, int]) -> dict[str, int]:
        return {name: size - kept.get(name, size) for name, size in self._sizes.items()}


def parameter_prices(units: Units, shapes: Mapping[str, tuple[int, ...]]) -> UnitPrices:
    """Weights of the targets: zeros are what is saved, as for pruners of weights."""
    lengths: dict[str, list[dict[str, int]]] = {name: [{} for _ in shape] for name, shape in shapes.items()}
    for name, group in units.items():
        for part in group.slices:
            per_unit = lengths[part.name][part.dim]
            per_unit[name] = per_unit.get(name, 0) + part.index.shape[1]
    terms = []
    for name, shape in shapes.items():
        widths = tuple(Width(full, per) for full, per in zip(shape, lengths[name], strict=True))
        terms.append(ProductTerm(1.0, widths))
    return UnitPrices(units, terms)


def flop_prices(units: Units) -> UnitPrices:
    """FLOPs of the whole model on one example."""
    terms = [
        ProductTerm(layer.flops / math.prod(width.full for width in layer.widths), layer.widths)
        for layer in units.layers
    ]
    return UnitPrices(units, terms, units.flops - sum(layer.flops for layer in units.layers), "FLOPs")
