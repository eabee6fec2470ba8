from __future__ import annotations

import itertools
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lightning_cap.errors import ConfigError
from lightning_cap.pruners import Magnitude, Pruner
from lightning_cap.sparsity.allocation import ERK, Allocation, Global, PerTarget, Uniform, apportion
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.decimals import round_share
from tests.support.pruners import METHODS


@given(st.decimals(0, "0.99", places=2), st.integers(1, 400))
def test_named_targets_get_their_share_as_it_is_written(sparsity: Decimal, size: int) -> None:
    """0.29 of 50 are 15, though ``0.29 * 50`` is 14.499999999999998."""
    share = math.floor(Fraction(sparsity) * size + Fraction(1, 2))
    budgets = PerTarget({"a": float(sparsity)}).budgets({"a": (size,), "b": (10,)}, {"a": 0, "b": 0}, share)
    assert budgets[0] == (["a"], share)


TARGETS = st.lists(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=6
)


@given(TARGETS, st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_budgets_add_up_and_never_undo_a_zero(targets: list[tuple[int, int]], share: float) -> None:
    sizes = {f"t{i}": n for i, (n, _) in enumerate(targets)}
    existing = {f"t{i}": z for i, (_, z) in enumerate(targets)}
    low, high = sum(existing.values()), sum(sizes.values())
    zeros = low + round(share * (high - low))
    shapes = {name: (size,) for name, size in sizes.items()}
    assert Global().budgets(shapes, existing, zeros) == [(list(sizes), zeros)]
    uniform = Uniform().budgets(shapes, existing, zeros)
    assert [names for names, _ in uniform] == [[name] for name in sizes]
    budgets = {names[0]: count for names, count in uniform}
    assert sum(budgets.values()) == zeros
    assert all(existing[name] <= budgets[name] <= sizes[name] for name in sizes)
    free = [name for name in sizes if budgets[name] > existing[name]]
    level = sum(budgets[n] for n in free) / max(1, sum(sizes[n] for n in free))
    assert all(abs(budgets[name] - level * sizes[name]) < 2 for name in free)
    slack = len(sizes) / max(1, sum(sizes[n] for n in free))  # of the level, by rounding the budgets it is taken from
    assert all(existing[name] > (level - slack) * sizes[name] - 2 for name in sizes if name not in free)


def test_uniform_by_hand() -> None:
    assert Uniform().budgets({"a": (2, 5), "b": (10,), "c": (5, 2)}, {"a": 0, "b": 0, "c": 0}, 16) == [
        (["a"], 6),
        (["b"], 5),
        (["c"], 5),
    ]
    assert Uniform().budgets({"a": (10,), "b": (10,)}, {"a": 8, "b": 0}, 10) == [(["a"], 8), (["b"], 2)]


@st.composite
def _layers(draw: st.DrawFn) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shapes, and zeros that are there already."""
    shape = st.one_of(
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(1, 40)),
    )
    shapes = {f"t{i}": s for i, s in enumerate(draw(st.lists(shape, min_size=1, max_size=6)))}
    share = st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0])
    existing = {name: round(draw(share) * math.prod(s)) for name, s in shapes.items()}
    return shapes, existing


FLOORS = st.sampled_from([0.0, 0.0, 0.05, 1 / 3, 0.5, 0.9])


KINDS = st.sampled_from(["Global", "Uniform", "ERK", "PerTarget"])


def _allocation(kind: str, floor: float) -> Allocation:
    if kind == "PerTarget":
        return PerTarget({"t0": 0.5}, floor)
    return {"Global": Global, "Uniform": Uniform, "ERK": ERK}[kind](floor)


def _feasible(allocation: Allocation, shapes: Any, existing: dict[str, int], zeros: int) -> bool:
    most = allocation.max_zeros(shapes, existing)
    if not isinstance(allocation, PerTarget):
        return zeros <= sum(most.values())
    size = math.prod(shapes["t0"])
    rest = zeros - max(existing["t0"], round_share(0.5, size))
    if len(shapes) == 1:
        return abs(rest) <= 0.005 * size
    return sum(existing.values()) - existing["t0"] <= rest <= sum(most.values()) - most["t0"]


@given(_layers(), KINDS, FLOORS, st.lists(st.floats(0, 0.999), min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_sequential_floors_and_exact_totals(layers: Any, kind: str, floor: float, sparsities: list[float]) -> None:
    """A run of rising sparsities, each from the zeros of the one before."""
    shapes, existing = layers
    allocation = _allocation(kind, floor)
    numel = sum(math.prod(s) for s in shapes.values())
    fewest = {
        n: min(math.prod(s) - existing[n], math.ceil(Fraction(str(floor)) * math.prod(s))) for n, s in shapes.items()
    }
    for sparsity in sorted(sparsities):
        zeros = max(round_share(sparsity, numel), sum(existing.values()))
        if not _feasible(allocation, shapes, existing, zeros):
            with pytest.raises(ConfigError, match=r"leaves room|so the whole can have"):
                allocation.budgets(shapes, existing, zeros)
            continue
        budgets = allocation.budgets(shapes, existing, zeros)
        assert sorted(name for names, _ in budgets for name in names) == sorted(shapes)
        assert sum(count for _, count in budgets) == zeros
        most = allocation.max_zeros(shapes, existing)
        reached = dict(existing)
        for names, count in budgets:
            left = count - sum(existing[n] for n in names)
            assert left >= 0, "no zero is undone"
            for name in names:  # the worst that a ranking could do within the budget
                taken = min(left, (most[name] if len(names) > 1 else math.prod(shapes[name])) - existing[name])
                reached[name], left = existing[name] + taken, left - taken
            assert left == 0, "the floors leave room for the budget"
        for name, shape in shapes.items():
            named = kind == "PerTarget" and name == "t0"
            assert named or math.prod(shape) - reached[name] >= fewest[name]
        existing = reached


@given(_layers(), st.sampled_from(["Uniform", "ERK"]), FLOORS, st.floats(0, 0.999), st.floats(0, 0.999))
@settings(max_examples=150, deadline=None)
def test_a_larger_total_never_means_fewer_zeros_for_a_target(
    layers: Any, kind: str, floor: float, one: float, two: float
) -> None:
    shapes, existing = layers
    allocation = _allocation(kind, floor)
    low, high = sum(existing.values()), sum(allocation.max_zeros(shapes, existing).values())
    less, more = (low + round(share * (high - low)) for share in sorted((one, two)))
    fewer, others = ({n: c for [n], c in allocation.budgets(shapes, existing, total)} for total in (less, more))
    assert all(fewer[n] <= others[n] for n in shapes)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_share_out_is_the_best_proportional_one(data: st.DataObject) -> None:
    """Webster: no unit could be moved to a name that is further below its share."""
    names = [f"n{i}" for i in range(data.draw(st.integers(1, 6)))]
    wanted = {n: Fraction(data.draw(st.integers(1, 50)), data.draw(st.integers(1, 9))) for n in names}
    lower = {n: data.draw(st.integers(0, 10)) for n in names}
    upper = {n: lower[n] + data.draw(st.integers(0, 20)) for n in names}
    total = data.draw(st.integers(sum(lower.values()), sum(upper.values())))
    out = apportion(wanted, lower, upper, total)
    assert list(out) == names
    assert sum(out.values()) == total
    assert all(lower[n] <= out[n] <= upper[n] for n in names)
    half = Fraction(1, 2)
    last = max(((out[n] - half) / wanted[n] for n in names if out[n] > lower[n]), default=0)
    following = min(((out[n] + half) / wanted[n] for n in names if out[n] < upper[n]), default=math.inf)
    assert last <= following


def test_erk_by_hand() -> None:
    """Densities ``eps (O + I + kH + kW) / (O I kH kW)``, none above 1: "small" stays dense, the others share the rest."""
    shapes = {"small": (2, 3), "conv": (8, 4, 3, 3), "linear": (20, 30)}
    zeros = 700
    numel = {"small": 6, "conv": 288, "linear": 600}
    dims = {"small": 5, "conv": 18, "linear": 50}
    kept = 894 - zeros
    eps = kept / sum(dims.values())
    assert eps * dims["small"] > 6  # dense, so
    eps = (kept - 6) / (18 + 50)
    budgets = {names[0]: count for names, count in ERK().budgets(shapes, dict.fromkeys(shapes, 0), zeros)}
    assert budgets["small"] == 0
    for name in ("conv", "linear"):
        assert abs((numel[name] - budgets[name]) - eps * dims[name]) < 1
    assert sum(budgets.values()) == zeros
    floored = {n: c for [n], c in ERK(0.3).budgets(shapes, dict.fromkeys(shapes, 0), 620)}
    assert floored == {"small": 0, "conv": 288 - 87, "linear": 419}  # conv is at its floor, 0.3 · 288 rounded up


def test_a_floor_is_what_was_written() -> None:
    for floor, kept in ((0.05, 50), (0.1, 100), (0.3, 300), (1 / 3, 334), (0.0501, 51), (1e-5, 1)):
        assert Global(floor).max_zeros({"a": (10, 100)}, {"a": 0}) == {"a": 1000 - kept}
    assert Global(0.5).max_zeros({"a": (10, 100)}, {"a": 700}) == {"a": 700}


def test_globs_and_names_of_a_map() -> None:
    shapes = {"a.fc1": (10, 10), "a.fc2": (10, 10), "b.fc1": (10, 10), "b.fc2": (10, 10)}
    none = dict.fromkeys(shapes, 0)
    given_map = PerTarget({"*.fc1": 0.8, "a.*": 0.2, "b.fc1": 0.6})
    assert given_map.budgets(shapes, none, 200) == [(["a.fc1"], 80), (["a.fc2"], 20), (["b.fc1"], 60), (["b.fc2"], 40)]
    assert PerTarget({"a.*": 0.5}).budgets(shapes, none, 200)[-1] == (["b.fc1", "b.fc2"], 100)
    already = {**none, "a.fc2": 30}
    assert given_map.budgets(shapes, already, 200)[1] == (["a.fc2"], 30)
    assert PerTarget().budgets(shapes, none, 200) == [(list(shapes), 200)]
    every = PerTarget({"*": 0.5})
    assert every.budgets(shapes, none, 200) == [([name], 50) for name in shapes]
    assert sum(count for _, count in every.budgets(shapes, none, 201)) == 201  # within half a percent


def test_what_a_map_or_a_floor_cannot_give_is_refused() -> None:
    shapes = {"a": (10, 10), "b": (10, 10)}
    none = dict.fromkeys(shapes, 0)
    with pytest.raises(ConfigError, match=r"sparsities: 'c\*' matches none of the 2 targets, first 'a'"):
        PerTarget({"c*": 0.5}).check(shapes)
    with pytest.raises(
        ConfigError, match=r"have 90 zeros, so the whole can have a sparsity from 0\.4500 to 0\.9500, not 0\.2"
    ):
        PerTarget({"a": 0.9}).budgets(shapes, none, 40)
    with pytest.raises(ConfigError, match=r"from 0\.4500 to 0\.7000, not 0\.9000"):
        PerTarget({"a": 0.9}, min_density=0.5).budgets(shapes, none, 180)
    with pytest.raises(ConfigError, match=r"from 0\.5000 to 0\.5000, not 0\.6000"):
        PerTarget({"*": 0.5}).budgets(shapes, none, 120)
    for wrong in (1.0, -0.1, True, math.nan):
        with pytest.raises(ConfigError, match=r"sparsities\['a'\]=.*in \[0, 1\)"):
            PerTarget({"a": wrong})
    for kind in (Global, Uniform, ERK, PerTarget):
        for wrong in (1.0, -0.1, True, math.nan):
            with pytest.raises(ConfigError, match=r"min_density=.*in \[0, 1\)"):
                kind(min_density=wrong)
    for kind in (Global, Uniform, ERK):
        with pytest.raises(ConfigError, match=r"min_density=0\.25 leaves room for 150 zeros, but .* asks for 160"):
            kind(0.25).budgets(shapes, none, 160)


@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=5), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.2, 0.5]),
    st.floats(0, 0.999),
)
@settings(max_examples=100, deadline=None)
def test_global_with_a_floor_is_the_least_sum_that_keeps_it(
    scores: list[list[int]], floor: float, sparsity: float
) -> None:
    weights = {f"t{i}": torch.tensor([row], dtype=torch.float32) for i, row in enumerate(scores)}
    targets, allocation = Targets(weights), Global(floor)
    zeros = round_share(sparsity, targets.numel)
    kept = [math.ceil(Fraction(str(floor)) * len(row)) for row in scores]
    if zeros > sum(len(row) - keep for row, keep in zip(scores, kept, strict=True)):
        with pytest.raises(ConfigError, match="leaves room for"):
            Magnitude(allocation=allocation).path(targets).at(sparsity)
        return
    masks = Magnitude(allocation=allocation).path(targets).at(sparsity).masks
    gone = [(~mask).sum().item() for mask in masks.values()]
    assert sum(gone) == zeros
    assert all(len(row) - count >= keep for row, count, keep in zip(scores, gone, kept, strict=True))
    found = sum(float(weights[n][~mask].sum()) for n, mask in masks.items())
    ways = itertools.product(*(range(len(row) - keep + 1) for row, keep in zip(scores, kept, strict=True)))
    sums = [[0, *itertools.accumulate(sorted(row))] for row in scores]
    assert found == min(sum(s[c] for s, c in zip(sums, way, strict=True)) for way in ways if sum(way) == zeros)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{class_path: lightning_cap.sparsity.ERK}", ERK()),
        ("{class_path: lightning_cap.sparsity.ERK, init_args: {min_density: 0.1}}", ERK(0.1)),
        ("{class_path: lightning_cap.sparsity.Global, init_args: {min_density: 0.05}}", Global(0.05)),
        ("lightning_cap.sparsity.Uniform", Uniform()),
        ("{class_path: lightning_cap.sparsity.PerTarget, init_args: {sparsities: {'*.fc?.weight': 0.9, head: 0}}}",
         PerTarget({"*.fc?.weight": 0.9, "head": 0.0})),
    ],
)  # fmt: skip
def test_from_yaml(text: str, expected: Allocation) -> None:
    assert allocation_from_yaml("CAP", text) == expected


@pytest.mark.parametrize("pruner", METHODS)
def test_every_pruner_takes_an_allocation_from_yaml(pruner: str) -> None:
    assert allocation_from_yaml(pruner, "lightning_cap.sparsity.ERK") == ERK()


def allocation_from_yaml(pruner: str, text: str) -> Allocation:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--pruner", type=Pruner)
    whole = f"{{class_path: lightning_cap.pruners.{pruner}, init_args: {{allocation: {text}}}}}"
    config = parser.parse_object({"pruner": yaml.safe_load(whole)})
    config = parser.parse_object(config.as_dict())  # as a saved config is read back
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    allocation: Allocation = instantiate(config).pruner.allocation
    return allocation
