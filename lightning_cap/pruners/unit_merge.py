"""One order of removal for the units of all groups, from one order in each group."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_cap.solver.ranking import pool_adjacent_violators
from lightning_cap.sparsity.unit_prices import UnitPrices
from lightning_cap.utilities.decimals import as_written


@dataclass(frozen=True, eq=False)
class UnitOrder:
    """The units of a group in the order in which they are removed.

    Attributes:
        units: ``(a,)`` int64 on the CPU, those that are there.
        losses: ``(a,)`` float64 on the CPU, what each removal costs more.
    """

    units: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Removal:
    """A unit that is removed.

    Attributes:
        group: Of the unit.
        unit: Its index in the group.
        loss: What that costs more.
        saved: Share of the price that is saved then.
    """

    group: str
    unit: int
    loss: float
    saved: float


class Merge:
    """Takes units from groups by the least loss for what they save, until no group has one to give.

    Losses within a group are made to rise (pool adjacent violators), so that each group is cut at a prefix of its order.

    Args:
        orders: ``{group: its order}``.
        prices: Of the model.
        sizes: ``{group: its units, those that are gone included}``.
        floors: ``{group: units to be left at least}``, 1 or more.
        uniform: Take units so that all groups keep about the same share, whatever the losses.
        by_price: Compare losses per price saved. Otherwise losses alone.
    """

    def __init__(
        self,
        orders: Mapping[str, UnitOrder],
        prices: UnitPrices,
        sizes: Mapping[str, int],
        floors: Mapping[str, int],
        uniform: bool = False,
        by_price: bool = True,
    ) -> None:
        self._orders, self._prices, self._sizes, self._floors = orders, prices, sizes, floors
        self._uniform, self._by_price = uniform, by_price
        self._kept = {name: len(order.units) for name, order in orders.items()}
        pooled = {n: pool_adjacent_violators(o.losses.float().unsqueeze(0))[0] for n, o in orders.items()}
        self._sums: dict[str, list[float]] = {
            n: [0.0, *losses.double().cumsum(0).tolist()] for n, losses in pooled.items()
        }

    def run(self) -> list[Removal]:
        """All removals that the floors allow."""
        names = list(self._orders)
        versions, numbers = dict.fromkeys(names, 0), {name: number for number, name in enumerate(names)}
        heap: list[tuple[float, int, int]] = []

        def push(name: str) -> None:
            versions[name] += 1
            key = self._key(name)
            if key is not None:
                heapq.heappush(heap, (key, numbers[name], versions[name]))

        for name in names:
            push(name)
        removals: list[Removal] = []
        saved = self._prices.total - self._prices.of(self._kept)
        while heap:
            _, number, version = heapq.heappop(heap)
            name = names[number]
            if version != versions[name]:
                continue
            saved += self._prices.saving(self._kept, name)
            place = self._taken(name)
            order = self._orders[name]
            self._kept[name] -= 1
            share = saved / self._prices.total
            removals.append(Removal(name, int(order.units[place]), float(order.losses[place]), share))
            for other in sorted(self._prices.neighbours(name)) if self._by_price and not self._uniform else [name]:
                push(other)
        return removals

    def _taken(self, name: str) -> int:
        return len(self._orders[name].units) - self._kept[name]

    def _room(self, name: str) -> int:
        return self._kept[name] - self._floors[name]

    def _key(self, name: str) -> float | None:
        """Smaller goes first; None where there is nothing to take, or nothing is saved by it."""
        room, taken, sums = self._room(name), self._taken(name), self._sums[name]
        if room <= 0:
            return None
        if self._uniform:
            return (self._sizes[name] - self._kept[name] + 0.5) / self._sizes[name]
        if not self._by_price:
            return sums[taken + 1] - sums[taken]
        steps, saving = 1, self._prices.saving(self._kept, name)
        while saving <= 0 and steps < room:  # times of layers have steps: look beyond
            steps = min(2 * steps, room)
            fewer = {**self._kept, name: self._kept[name] - steps}
            saving = self._prices.of(self._kept) - self._prices.of(fewer)
        loss: float = sums[taken + steps] - sums[taken]
        return loss / saving if saving > 0 else None


def prefix(removals: Sequence[Removal], goal: float, start: float = 0.0) -> int | None:
    """How many removals save the share ``goal`` when ``start`` is saved before them; None where all do not."""
    if reaches(start, goal):
        return 0
    return next((n for n, removal in enumerate(removals, 1) if reaches(removal.saved, goal)), None)


def reaches(saved: float, goal: float) -> bool:
    """Whether a share saved is the goal or more, but for rounding."""
    return saved >= goal - 1e-9


def kept_after(kept: Mapping[str, Tensor], removals: Sequence[Removal]) -> dict[str, Tensor]:
    """``{group: bool (size)}`` after some removals."""
    left = {name: units.clone() for name, units in kept.items()}
    for name in left:
        gone = [removal.unit for removal in removals if removal.group == name]
        left[name][torch.tensor(gone, dtype=torch.int64)] = False
    return left


def floors_of(sizes: Mapping[str, int], min_density: float, kept: Mapping[str, int]) -> dict[str, int]:
    """Units that each group keeps at least: one, the share ``min_density``, but no more than there are."""
    floor = as_written(min_density)
    return {name: min(kept[name], max(1, math.ceil(floor * size))) for name, size in sizes.items()}
