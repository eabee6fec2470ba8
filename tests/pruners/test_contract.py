"""What every pruner must keep. A new one is a line in `tests/support/pruners.py`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_cap import pruners
from lightning_cap.errors import CAPError, ConfigError, GradientError, PatternError, UnsupportedError
from lightning_cap.pruners import Pruner, PruneResult, PruningPath, UnitPruner
from lightning_cap.sparsity.targets import Targets
from tests.support.problems import MIXED, Rows, gradient_rows, random_masks, random_targets, same_result
from tests.support.pruners import CASES, UNIT_CASES, Case, select

HALF = Fraction(1, 2)
SPARSITIES = [0.0, 0.1, 0.33, 0.5, 0.75, 0.9, 0.99]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=select(regrows=False))
def lasting(request: pytest.FixtureRequest) -> Case:
    """One whose masked weights never come back."""
    return CASES[request.param]


@pytest.fixture
def targets() -> Targets:
    return random_targets()


@pytest.fixture
def rows(targets: Targets) -> Rows:
    return gradient_rows(targets, 40)


def test_every_pruner_is_in_the_table() -> None:
    classes = [value for value in vars(pruners).values() if isinstance(value, type) and issubclass(value, Pruner)]
    kinds = [case.kind for case in (*CASES.values(), *UNIT_CASES.values())]
    assert set(kinds) == set(classes) - {Pruner, UnitPruner}


def _zeros(result: PruneResult) -> int:
    return sum(int((~mask).sum()) for mask in result.masks.values())


def _check(result: PruneResult, targets: Targets, zeros: int, signed: bool = False) -> None:
    """What holds of every result."""
    assert list(result.weights) == list(result.masks) == list(targets)
    for name, weight in targets.items():
        assert result.weights[name].shape == result.masks[name].shape == weight.shape
        assert result.weights[name].dtype == weight.dtype
        assert result.masks[name].dtype == torch.bool
        assert result.weights[name].isfinite().all()
        assert torch.equal(result.weights[name] != 0, result.masks[name])
        assert not result.weights[name].requires_grad
    assert _zeros(result) == zeros
    assert result.sparsity == pytest.approx(zeros / targets.numel)
    assert math.isfinite(result.saliency)
    assert result.saliency >= 0 or signed


def test_counts_are_exact(case: Case, targets: Targets, rows: Rows) -> None:
    path = case.path(targets, rows)
    assert path.sparsity == 0
    for sparsity in SPARSITIES:
        _check(path.at(sparsity), targets, math.floor(Fraction(str(sparsity)) * targets.numel + HALF), case.signed)


def test_nothing_but_a_loss_is_called_one(case: Case, targets: Targets, rows: Rows) -> None:
    for sparsity in (0.0, 0.5):
        result = case.path(targets, rows).at(sparsity)
        assert result.predicted_loss == (result.saliency if case.predicts_loss else None)


def test_decimals_are_taken_as_they_are_written(case: Case) -> None:
    """``0.29 * 50`` is 14.499999999999998, and 0.29 of 50 weights are 15."""
    targets = random_targets({"w": (5, 10)})
    path = case.path(targets, gradient_rows(targets, 12))
    assert [_zeros(path.at(sparsity)) for sparsity in (0.29, 0.57, np.float32(0.29), np.float64(0.57))] == [
        15,
        29,
        15,
        29,
    ]


def test_masked_stays_masked(lasting: Case, targets: Targets, rows: Rows) -> None:
    masks = random_masks(targets, 0.2)
    path = lasting.path(targets, rows, masks)
    low = sum(int((~m).sum()) for m in masks.values())
    assert path.sparsity == pytest.approx(low / targets.numel)
    for sparsity in SPARSITIES:
        zeros = math.floor(Fraction(str(sparsity)) * targets.numel + HALF)
        if zeros < low:
            continue
        result = path.at(sparsity)
        _check(result, targets, zeros, lasting.signed)
        for name, mask in masks.items():
            assert not (result.masks[name] & ~mask).any()


def test_masks_are_nested_and_loss_grows(case: Case, targets: Targets, rows: Rows) -> None:
    path = case.path(targets, rows)
    results = [path.at(sparsity) for sparsity in SPARSITIES]
    for less, more in pairwise(results):
        assert not path.nested or all(not (more.masks[n] & ~less.masks[n]).any() for n in targets)
        assert less.saliency < more.saliency or case.signed
    assert results[0].saliency == 0
    assert all(torch.equal(results[0].weights[n], w) for n, w in targets.items())


def test_path_is_never_consumed_and_curve_tells_the_same(case: Case, targets: Targets, rows: Rows) -> None:
    path = case.path(targets, rows)
    first = [path.at(sparsity) for sparsity in SPARSITIES]
    again = [path.at(sparsity) for sparsity in reversed(SPARSITIES)][::-1]
    assert all(same_result(a, b) for a, b in zip(first, again, strict=True))
    assert path.curve(SPARSITIES) == [result.saliency for result in first]
    assert path.curve([]) == []
    first[3].weights["linear"].zero_()
    first[0].weights["linear"].zero_()  # the caller may do what he likes with what he got
    first[0].masks["linear"].zero_()
    assert all(same_result(path.at(s), r) for s, r in zip(SPARSITIES[1:3], first[1:3], strict=True))
    assert same_result(path.at(0.0), again[0])


def test_every_candidate_has_the_exact_count(case: Case, targets: Targets, rows: Rows) -> None:
    path = case.path(targets, rows)
    for sparsity in (0.0, 0.5):
        results = path.candidates(sparsity)
        assert same_result(results[0], path.at(sparsity))
        for result in results:
            _check(result, targets, math.floor(Fraction(str(sparsity)) * targets.numel + HALF), case.signed)


def test_model_changes_only_when_applied(case: Case, targets: Targets, rows: Rows) -> None:
    before = copy.deepcopy(targets.weights())
    chunks = copy.deepcopy(rows)
    masks = random_masks(targets, 0.2)
    given = copy.deepcopy(masks)
    result = case.path(targets, rows, masks).at(0.5)
    assert all(torch.equal(w, before[n]) and w.requires_grad and w.grad is None for n, w in targets.items())
    assert all(torch.equal(a[n], b[n]) for a, b in zip(chunks, rows, strict=True) for n in a)
    assert all(torch.equal(masks[n], given[n]) for n in masks)
    result.apply(targets)
    assert all(torch.equal(w, result.weights[n]) and w.requires_grad for n, w in targets.items())


def test_tells_what_is_reached(case: Case, targets: Targets) -> None:
    pruner, masks = case.pruner(), random_masks(targets, 0.4)
    low = sum(int((~m).sum()) for m in masks.values()) / targets.numel
    assert pruner.reached(targets, None) == 0
    assert pruner.reached(targets, masks) == pytest.approx(low)
    assert pruner.exceeds(0.3, targets, masks)
    assert not pruner.exceeds(low, targets, masks)


def test_is_deterministic(case: Case, targets: Targets, rows: Rows) -> None:
    state = torch.get_rng_state()
    one, two = (case.path(targets, rows, random_masks(targets, 0.2)).at(0.6) for _ in range(2))
    assert same_result(one, two)
    assert torch.equal(torch.get_rng_state(), state)


def test_does_not_depend_on_the_order_of_targets(case: Case, targets: Targets, rows: Rows) -> None:
    turned = Targets({name: targets[name] for name in reversed(list(targets))})
    one, two = (case.path(t, rows).at(0.5) for t in (targets, turned))
    assert list(two.weights) == list(turned)
    for name in targets:
        assert torch.equal(one.masks[name], two.masks[name])
        torch.testing.assert_close(one.weights[name], two.weights[name], rtol=1e-4, atol=1e-5)


def test_kept_weights_change_only_where_the_method_updates(case: Case, targets: Targets, rows: Rows) -> None:
    result = case.path(targets, rows).at(0.5)
    large = {name: w for name, w in targets.items() if name != "tiny"}  # a block that loses none is left alone
    moved = [bool((result.weights[n] != torch.where(result.masks[n], w, 0.0)).any()) for n, w in large.items()]
    assert all(moved) if case.updates else not any(moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_weights(case: Case, targets: Targets, rows: Rows, dtype: torch.dtype) -> None:
    cast = Targets({name: nn.Parameter(w.detach().to(dtype)) for name, w in targets.items()})
    path = case.path(cast, [{n: g.to(dtype) for n, g in chunk.items()} for chunk in rows])
    _check(path.at(0.5), cast, math.floor(0.5 * cast.numel + 0.5), case.signed)
    dense = path.at(0.0)
    assert all(torch.equal(dense.weights[n], w) for n, w in cast.items())
    if not case.updates:
        half = path.at(0.5)
        assert all(torch.equal(half.weights[n], w * half.masks[n]) for n, w in cast.items())


@pytest.mark.parametrize("name", select(updates=True))
def test_weights_beyond_float16_are_refused_by_name(name: str) -> None:
    """Correlated weights are merged into one: four of 40,000 into one of 160,000, which would be infinite."""
    weights = {"small": torch.full((1, 4), 2.0).half(), "large": torch.full((1, 4), 4e4).half()}
    targets = Targets({n: nn.Parameter(w) for n, w in weights.items()})
    path = CASES[name].path(targets, [{n: torch.ones(8, 1, 4) for n in weights}])
    with pytest.raises(UnsupportedError, match=r"'large'.* is beyond 65504, the largest number of torch.float16"):
        path.at(0.8)
    assert all(torch.equal(targets[n], w) for n, w in weights.items())


def test_float64_weights_keep_their_digits(case: Case, targets: Targets, rows: Rows) -> None:
    fine = {
        name: w.detach().double() + torch.randn(w.shape, dtype=torch.float64) * 1e-10 for name, w in targets.items()
    }
    cast = Targets({name: nn.Parameter(w) for name, w in fine.items()})
    dense = case.path(cast, rows).at(0.0)
    assert all(torch.equal(dense.weights[n], w) for n, w in cast.items())


def test_all_zero_target(case: Case, targets: Targets, rows: Rows) -> None:
    with torch.no_grad():
        targets["linear"].zero_()
    result = case.path(targets, rows).at(0.5)
    assert _zeros(result) == math.floor(0.5 * targets.numel + 0.5)
    assert not result.weights["linear"].any()
    assert all(torch.equal(result.weights[n] != 0, result.masks[n]) for n in targets if n != "linear")
    if not case.uniform and not case.signed:
        assert not result.masks["linear"].any(), "what is zero costs nothing and goes first"


def zeroed(rows: Rows, *names: str) -> Rows:
    return [{n: torch.zeros_like(g) if n in names else g for n, g in chunk.items()} for chunk in rows]


def test_gradients_that_are_all_zero_are_refused(case: Case, targets: Targets, rows: Rows) -> None:
    masks = random_masks(targets, 0.2) if case.regrows else None  # else it reads nothing
    if case.reads == "nothing":
        case.path(targets, zeroed(rows, *targets)).at(0.5)
        return
    with pytest.raises(GradientError, match=rf"^{case.reads}: all 40 are zero, .* for all 4 targets\. Check the"):
        case.path(targets, zeroed(rows, *targets), masks)


def test_a_target_without_gradients_is_told(case: Case, targets: Targets, rows: Rows) -> None:
    masks = {
        **random_masks(targets, 0.2),
        "tiny": torch.zeros(MIXED["tiny"], dtype=torch.bool),
    }  # nothing is left of it
    some = zeroed(rows, "conv", "tiny")
    if case.reads == "nothing":
        case.path(targets, some, masks).at(0.5)
        return
    with pytest.warns(
        UserWarning, match=rf"{case.reads}: all 40 are zero for [12] of [34] targets, first '(conv|tiny)'"
    ):
        path = case.path(targets, some, masks)
    result = path.at(0.5)
    kept = result.masks["conv"] & masks["conv"]
    assert torch.equal(result.weights["conv"], targets["conv"] * kept), "no gradient, no update"


def test_more_zeros_than_asked_for_warns_and_changes_nothing(lasting: Case, targets: Targets, rows: Rows) -> None:
    masks = random_masks(targets, 0.4)
    path = lasting.path(targets, rows, masks)
    with pytest.warns(UserWarning, match=r"sparsity=0\.2: the model is already at 0\.[34]\d+.*higher sparsity"):
        result = path.at(0.2)
    assert result.saliency == 0
    assert result.sparsity == pytest.approx(path.sparsity)
    for name, weight in targets.items():
        assert torch.equal(result.masks[name], masks[name])
        assert torch.equal(result.weights[name], torch.where(masks[name], weight, 0.0))
    with pytest.warns(UserWarning, match="already at"):
        assert path.curve([0.2]) == [0.0]


def test_exactly_the_zeros_that_are_there(case: Case, targets: Targets, rows: Rows) -> None:
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in targets.items()}
    numel = targets.numel
    for name in ("odd", "linear"):
        masks[name].view(-1)[: numel // 8] = False
    zeros = sum(int((~m).sum()) for m in masks.values())
    result = case.path(targets, rows, masks).at(zeros / numel)
    assert _zeros(result) >= zeros
    assert _zeros(result) == zeros


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.1, 50, float("nan")])
def test_sparsity_outside_is_refused(case: Case, targets: Targets, rows: Rows, sparsity: float) -> None:
    pruner = case.pruner()
    path = case.path(targets, rows)
    for ask in (path.at, pruner.check_sparsity, lambda s: path.curve([0.5, s])):
        with pytest.raises(PatternError, match=r"sparsity=.*\[0, 1\)"):
            ask(sparsity)


@pytest.mark.parametrize("sparsity", [0.995, 0.999, 1 - 1e-9])
def test_to_the_last_weight(case: Case, targets: Targets, rows: Rows, sparsity: float) -> None:
    _check(
        case.path(targets, rows).at(sparsity),
        targets,
        math.floor(Fraction(str(sparsity)) * targets.numel + HALF),
        case.signed,
    )


def test_one_target_of_one_weight(case: Case) -> None:
    targets = Targets({"w": nn.Parameter(torch.tensor([[2.0]]))})
    path = case.path(targets, [{"w": torch.ones(3, 1, 1)}])
    assert path.at(0.4).weights["w"].item() == 2
    assert path.at(0.6).weights["w"].item() == 0


def test_masks_that_do_not_fit_are_refused(case: Case, targets: Targets, rows: Rows) -> None:
    ones: dict[str, Any] = {name: torch.ones(s, dtype=torch.bool) for name, s in MIXED.items()}
    with pytest.raises(ConfigError, match=r"masks: 'lin'.*there is no such target"):
        case.path(targets, rows, {"lin": ones["linear"]})
    with pytest.raises(ConfigError, match=r"masks: 'linear' has shape \(8, 6\), but its weight has \(6, 8\)"):
        case.path(targets, rows, {**ones, "linear": ones["linear"].t()})
    partial = case.path(targets, rows, {"odd": torch.zeros(MIXED["odd"], dtype=torch.bool)})
    assert partial.sparsity == pytest.approx(84 / targets.numel)  # others are free


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused(case: Case, targets: Targets, rows: Rows, value: float) -> None:
    with torch.no_grad():
        targets["conv"][0, 1, 1, 2] = value
    with pytest.raises(CAPError, match="'conv' is not finite"):
        case.path(targets, rows)


@pytest.mark.parametrize("name", select(reads="nothing"))
def test_what_needs_no_data_reads_none(name: str, targets: Targets) -> None:
    def unread() -> Iterator[Any]:
        raise AssertionError("gradients were read")
        yield

    CASES[name].path(targets, unread()).at(0.5)


def test_closed_paths(case: Case, targets: Targets, rows: Rows) -> None:
    with case.path(targets, rows) as path:
        path.at(0.5)
    path.close()  # twice is no error
    if case.owns_fisher:
        with pytest.raises(GradientError, match="closed"):
            path.at(0.5)


def test_progress_ends_at_its_total(case: Case, targets: Targets, rows: Rows) -> None:
    seen: list[tuple[str, int, int]] = []
    case.path(targets, rows, progress=lambda *step: seen.append(step))
    assert all(0 < done <= total for _, done, total in seen)
    assert not seen or seen[-1][1] == seen[-1][2]


def test_repr_and_copies(case: Case, targets: Targets, rows: Rows) -> None:
    pruner = case.pruner()
    assert repr(pruner).startswith(type(pruner).__name__)
    path = case.path(targets, rows)
    assert isinstance(path, PruningPath)
    assert repr(path) == f"{type(path).__name__}(4 targets of {targets.numel} weights, from sparsity 0.0000)"
    half = repr(path.at(0.5))
    assert half.startswith("PruneResult(sparsity=0.5000, ")
    assert half.endswith(f"4 targets of {targets.numel} weights)")
    assert ("predicted_loss" in half) == case.predicts_loss
    assert same_result(path.at(0.5), case.path(targets, rows).at(0.5))
