"""Every pruner x pattern x allocation: refused by name, or everything that a user counts on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_cap.errors import PatternError
from lightning_cap.pruners import Pruner, PruneResult
from lightning_cap.sparsity.allocation import ERK, Allocation, Global, PerTarget, Uniform
from lightning_cap.sparsity.patterns import BlockOf, NofM, OutputRows, Pattern, Unstructured, check_pattern
from lightning_cap.sparsity.targets import Targets
from tests.support.problems import gradient_rows
from tests.support.pruners import USUAL, Case

PATTERNS: list[Pattern] = [Unstructured(), NofM(2, 4), NofM(1, 4), BlockOf(4), BlockOf(2), OutputRows()]
ALLOCATIONS: dict[str, Allocation] = {
    "global": Global(),
    "uniform": Uniform(),
    "erk": ERK(),
    "per-target": PerTarget({"a": 0.75, "c*": 0.25}),
    "floor": Global(0.25),
    "erk-floor": ERK(0.3),
}
SHAPES = {"a": (8, 8), "tiny": (1, 4), "conv": (4, 8, 1, 2), "b": (6, 12)}  # 4 weights: less than a block


def _targets(dtype: torch.dtype = torch.float32) -> Targets:
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}
    weights["b"] *= 3  # little goes of it where all compete, and all of "a": floors bind
    weights["a"] *= 0.02
    return Targets({name: nn.Parameter(weight) for name, weight in weights.items()})


def _pruner(case: Case, **settings: Any) -> Pruner:
    return case.pruner(**{"block_size": 12, "num_gradients": 24, **settings})


TAKEN = [(name, pattern) for name, case in USUAL.items() for pattern in PATTERNS if case.takes(pattern)]


def _unit(pattern: Pattern, name: str) -> int:
    if isinstance(pattern, OutputRows):
        return math.prod(SHAPES[name][1:])
    return pattern.n if isinstance(pattern, BlockOf) else 1


def _zeros(masks: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in masks.items()}


def _check_counts(result: PruneResult, pattern: Pattern, allocation: Allocation, before: Any, sparsity: float) -> None:
    zeros, existing = _zeros(result.masks), _zeros(before)
    total = sum(math.prod(s) for s in SHAPES.values())
    most = allocation.max_zeros(SHAPES, existing)
    units = {name: _unit(pattern, name) for name in SHAPES}
    assert all(zeros[name] <= most[name] for name in SHAPES), "floors are kept"
    assert all((zeros[name] - existing[name]) % units[name] == 0 for name in SHAPES)
    for names, count in allocation.budgets(SHAPES, existing, math.floor(sparsity * total + 0.5)):
        short = count - sum(zeros[name] for name in names)
        assert short >= 0, "never more than asked for"
        room = [units[name] for name in names if zeros[name] + units[name] <= most[name]]
        assert not room or short < max(room), "less than one unit short"
        assert short == 0 or max(units[name] for name in names) > 1


def _same(one: PruneResult, two: PruneResult) -> bool:
    return all(torch.equal(one.masks[n], two.masks[n]) and torch.equal(one.weights[n], two.weights[n]) for n in SHAPES)


def _thinned(*factors: Any) -> Any:
    """Parametrizes a test by a product. Quick are as many as take every pair of values of two factors; the rest is slow.

    They are a Latin square: all but the last factor at any value, and the last one at that which follows from them.
    """
    numbered = [list(enumerate(factor)) for factor in factors]
    cases = []
    for places in itertools.product(*numbered):
        marks = [pytest.mark.slow] if sum(i for i, _ in places) % len(numbered[-1]) else []
        values = [value for _, value in places]
        cases.append(pytest.param(*values, id="-".join(map(str, values)), marks=marks))
    return cases


@pytest.mark.parametrize(("name", "pattern", "allocation"), _thinned(USUAL, PATTERNS, ALLOCATIONS))
def test_matrix(name: str, pattern: Pattern, allocation: str) -> None:
    case, how = USUAL[name], ALLOCATIONS[allocation]
    if not case.takes(pattern):
        with pytest.raises(PatternError, match=rf"pattern={str(pattern)[:5]}.*Use [A-Z]\w+"):
            case.pruner(pattern=pattern)
        return
    targets = _targets()
    rows = gradient_rows(targets, 24)
    pruner = _pruner(case, pattern=pattern, allocation=how)
    pruner.check(targets)
    path = case.path(targets, rows, pruner=pruner)
    masks = {n: torch.ones(s, dtype=torch.bool) for n, s in SHAPES.items()}
    if isinstance(pattern, NofM):
        result = path.at(pattern.sparsity)
        assert result.sparsity == pytest.approx(pattern.sparsity)
        check_pattern(targets, pattern, result.masks)
        assert _same(result, case.path(targets, rows, pruner=pruner).at(pattern.sparsity))
        return
    results = [path.at(sparsity) for sparsity in (0.45, 0.6)]
    for result, sparsity in zip(results, (0.45, 0.6), strict=True):
        _check_counts(result, pattern, how, masks, sparsity)
        check_pattern(targets, pattern, result.masks)
        assert path.curve([sparsity]) == [result.saliency]
    less, more = results
    assert not path.nested or all(not (more.masks[n] & ~less.masks[n]).any() for n in SHAPES)
    assert _same(results[1], case.path(targets, rows, pruner=pruner).at(0.6)), "deterministic"
    later = case.path(targets, rows, results[0].masks, pruner=pruner).at(0.6)  # the next event of a run
    _check_counts(later, pattern, how, results[0].masks, 0.6)
    check_pattern(targets, pattern, later.masks)
    assert all(not (later.masks[n] & ~results[0].masks[n]).any() for n in SHAPES), "masked stay masked"
    assert all(torch.equal(later.weights[n] != 0, later.masks[n]) for n in SHAPES)


@pytest.mark.parametrize(("name", "pattern"), [(n, p) for n, p in TAKEN if p in (BlockOf(4), OutputRows())])
def test_floors_where_whole_units_leave_a_remainder(name: str, pattern: Pattern) -> None:
    """The floors leave room for 153 zeros, but only for 148 in groups, and for less in rows: those go, and no more."""
    targets = _targets()
    pruner = _pruner(USUAL[name], pattern=pattern, allocation=Global(0.25))
    path = USUAL[name].path(targets, gradient_rows(targets, 24), pruner=pruner)
    zeros = _zeros(path.at(0.745).masks)
    assert sum(zeros.values()) < math.floor(0.745 * targets.numel + 0.5)
    most = {n: math.floor(0.75 * math.prod(s)) // _unit(pattern, n) * _unit(pattern, n) for n, s in SHAPES.items()}
    assert zeros == most


@pytest.mark.parametrize(("name", "pattern"), TAKEN)
def test_masks_that_break_groups_stay(name: str, pattern: Pattern) -> None:
    targets = _targets()
    rows = gradient_rows(targets, 24)
    generator = torch.Generator().manual_seed(3)
    masks = {n: torch.rand(s, generator=generator) >= 0.25 for n, s in SHAPES.items()}
    case = USUAL[name]
    pruner = _pruner(case, pattern=pattern, allocation=Global())
    result = case.path(targets, rows, masks, pruner=pruner).at(pattern.sparsity or 0.6)
    zeros, total = sum(_zeros(result.masks).values()), targets.numel
    assert all(not (result.masks[n] & ~masks[n]).any() for n in SHAPES)
    assert all(torch.equal(result.weights[n] != 0, result.masks[n]) for n in SHAPES)
    if isinstance(pattern, NofM):
        check_pattern(targets, pattern, result.masks)
    else:
        wanted = math.floor(0.6 * total + 0.5)
        assert wanted - max(_unit(pattern, n) for n in SHAPES) < zeros <= wanted
    if pattern.whole_groups:  # a group is left as it was, or gone
        layout = targets.blocks(pattern.group_size, pattern.group_size)
        packed = [layout.pack(m, torch.bool) for m in (masks, result.masks)]
        for n, span in layout.spans.items():
            before, after = (pattern.units(p[span], SHAPES[n]) for p in packed)
            assert ((before == after).all(-1) | ~after.any(-1)).all()


@pytest.mark.parametrize(("taken", "dtype"), _thinned(TAKEN, [torch.bfloat16, torch.float64]))
def test_dtypes_and_zero_targets(taken: tuple[str, Pattern], dtype: torch.dtype) -> None:
    name, pattern = taken
    targets = _targets(dtype)
    rows = gradient_rows(targets, 24)
    sparsity = pattern.sparsity or 0.6
    case = USUAL[name]
    pruner = _pruner(case, pattern=pattern, allocation=Global())
    every = {n: torch.ones(s, dtype=torch.bool) for n, s in SHAPES.items()}
    result = case.path(targets, rows, pruner=pruner).at(sparsity)
    check_pattern(targets, pattern, result.masks)
    assert all(result.weights[n].dtype == dtype and result.weights[n].isfinite().all() for n in SHAPES)
    assert all(torch.equal(result.weights[n] != 0, result.masks[n]) for n in SHAPES)
    if not isinstance(pattern, NofM):
        _check_counts(result, pattern, Global(), every, sparsity)
    with torch.no_grad():
        targets["b"].zero_()
    result = case.path(targets, rows, pruner=pruner).at(sparsity)
    check_pattern(targets, pattern, result.masks)
    assert not result.weights["b"].any()
    assert all(w.isfinite().all() for w in result.weights.values())
    if not isinstance(pattern, NofM):
        _check_counts(result, pattern, Global(), every, sparsity)
        if not case.signed:
            assert not result.masks["b"].any(), "what is zero costs nothing and goes first"


def _permuted(value: Tensor, order: Tensor) -> Tensor:
    """Output rows ``(..., O, I)`` in another order."""
    return value[..., order, :]


@pytest.mark.parametrize(
    ("name", "pattern"), [(n, p) for n, p in TAKEN if not USUAL[n].takes("seed")]
)  # lots go by place
def test_the_order_of_blocks_does_not_matter(name: str, pattern: Pattern) -> None:
    case = USUAL[name]
    inputs = case.own.get("block_size", 12)  # an output row is a block
    generator = torch.Generator().manual_seed(9)
    weights = {"a": torch.randn(7, inputs, generator=generator), "b": torch.randn(5, inputs, generator=generator)}
    rows = gradient_rows(weights, 24)
    orders = {n: torch.randperm(len(w), generator=generator) for n, w in weights.items()}
    turned = {n: _permuted(w, orders[n]) for n, w in weights.items()}
    turned_rows = [{n: _permuted(g, orders[n]) for n, g in chunk.items()} for chunk in rows]
    if case.reads == "inputs":
        turned_rows = rows  # those of a layer are of all its output rows
    pruner = _pruner(case, pattern=pattern, allocation=Global())
    one = case.path(Targets(weights), rows, pruner=pruner).at(pattern.sparsity or 0.6)
    two = case.path(Targets(turned), turned_rows, pruner=pruner).at(pattern.sparsity or 0.6)
    for n, order in orders.items():
        assert torch.equal(two.masks[n], _permuted(one.masks[n], order))
        torch.testing.assert_close(two.weights[n], _permuted(one.weights[n], order), rtol=1e-4, atol=1e-5)
    assert two.saliency == pytest.approx(one.saliency, rel=1e-5)
