"""Allocation over groups against brute force."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_cap.pruners.unit_merge import Merge, UnitOrder, prefix
from lightning_cap.sparsity import UnitGroup, Units
from lightning_cap.sparsity.unit_prices import UnitPrices
from tests.references.units import least_prefixes


class Table:
    """Price of a group by how many of its units are kept."""

    def __init__(self, group: str, prices: Sequence[float]) -> None:
        self.groups, self._prices = (group,), prices

    def price(self, pruned: Mapping[str, int]) -> float:
        return self._prices[len(self._prices) - 1 - pruned.get(self.groups[0], 0)]


def _prices(tables: Mapping[str, Sequence[float]]) -> UnitPrices:
    units = Units([UnitGroup(name, "neuron", len(t) - 1, (), (), ()) for name, t in tables.items()])
    return UnitPrices(units, [Table(name, table) for name, table in tables.items()])


def _order(losses: Sequence[float]) -> UnitOrder:
    return UnitOrder(torch.arange(len(losses)), torch.tensor(losses, dtype=torch.float64))


def _merge(losses: Mapping[str, Sequence[float]], tables: Mapping[str, Sequence[float]], **more: bool) -> Merge:
    sizes = {name: len(values) for name, values in losses.items()}
    orders = {name: _order(values) for name, values in losses.items()}
    return Merge(orders, _prices(tables), sizes, dict.fromkeys(losses, 1), **more)


@settings(deadline=None)
@given(st.data())
def test_loss_is_least_at_every_length_of_rising_losses(data: st.DataObject) -> None:
    """With one price per unit of a group, taking by loss per price is best among all that save as much."""
    rising = st.lists(st.integers(1, 50), min_size=2, max_size=4).map(sorted)
    losses = {name: data.draw(rising) for name in "abc"}
    prices = {name: float(data.draw(st.integers(1, 4))) for name in "abc"}
    tables = {name: [prices[name] * k for k in range(len(values) + 1)] for name, values in losses.items()}
    removals = _merge(losses, tables).run()
    assert len(removals) == sum(len(values) - 1 for values in losses.values())
    total, loss, saved = sum(table[-1] for table in tables.values()), 0.0, 0.0
    for removal in removals:
        loss, saved = loss + removal.loss, saved + prices[removal.group]
        assert removal.saved == pytest.approx(saved / total)
        assert loss == pytest.approx(least_prefixes(losses, prices, saved)[0])


def test_a_cheap_unit_behind_a_dear_one_is_reached() -> None:
    """Losses 5, 1 are pooled to 3, 3: together they cost less than two of 4."""
    removals = _merge({"a": [5, 1, 9], "b": [4, 4, 9]}, {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}).run()
    assert [removal.group for removal in removals] == ["a", "a", "b", "b"]
    assert [removal.loss for removal in removals] == [5, 1, 4, 4]


def test_prices_that_change_with_other_groups_are_asked_again() -> None:
    class Product:
        groups = ("a", "b")

        def price(self, pruned: Mapping[str, int]) -> float:
            return (4 - pruned.get("a", 0)) * (4 - pruned.get("b", 0))

    units = Units([UnitGroup(name, "neuron", 4, (), (), ()) for name in "ab"])
    prices = UnitPrices(units, [Product()])
    orders = {"a": _order([1, 1.2, 1.3, 9]), "b": _order([1.1, 2.2, 4, 9])}
    removals = Merge(orders, prices, {"a": 4, "b": 4}, {"a": 1, "b": 1}).run()
    # a: 1/4; then a saves 4, b saves 3: 1.2/4 < 1.1/3; then 1.3/4 < 1.1/2; then b alone is left
    assert [removal.group for removal in removals] == ["a", "a", "a", "b", "b", "b"]
    assert [round(16 * removal.saved) for removal in removals] == [4, 8, 12, 13, 14, 15]


def test_steps_of_a_table_are_looked_beyond() -> None:
    """Units of ``a`` save nothing but every second time; those that save nothing to the end are not taken."""
    tables = {"a": [0, 2, 2, 4, 4], "b": [0, 1, 2, 3, 4], "c": [1, 1, 1, 1, 1]}
    removals = _merge({"a": [1, 1, 1, 1], "b": [3, 3, 3, 3], "c": [0.1] * 4}, tables).run()
    assert [removal.group for removal in removals] == ["a", "a", "b", "b", "b"]


def test_uniform_and_unpriced() -> None:
    losses, tables = {"a": [1, 1, 1, 1], "b": [1, 1]}, {"a": [0, 1, 2, 3, 4], "b": [0, 100, 200]}
    assert [r.group for r in _merge(losses, tables, uniform=True).run()] == ["a", "b", "a", "a"]
    dear = {"a": [2, 2, 2, 2], "b": [3, 3]}
    assert [r.group for r in _merge(dear, tables, by_price=False).run()] == ["a", "a", "a", "b"]
    assert [r.group for r in _merge(dear, tables).run()] == ["b", "a", "a", "a"]


def test_prefixes() -> None:
    removals = _merge({"a": [1, 2, 3, 4]}, {"a": [0, 1, 2, 3, 4]}).run()
    assert [prefix(removals, goal) for goal in (0, 0.1, 0.25, 0.26, 0.75)] == [0, 1, 1, 2, 3]
    assert prefix(removals, 0.76) is None
    assert prefix(removals, 0.25, start=0.25) == 0
    assert prefix(removals, math.nextafter(0.25, 1)) == 1, "but for rounding"
