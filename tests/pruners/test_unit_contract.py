"""What every pruner of units must keep. A new one is a line in `tests/support/pruners.py`."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_cap.errors import CAPError, ConfigError, GradientError, PatternError, TargetError, UnsupportedError
from lightning_cap.pruners import PruneResult, PruningPath
from lightning_cap.sparsity import Flops, Global, MaskSet, Parameters, Targets, Uniform
from tests.support.problems import random_masks, same_result
from tests.support.pruners import UNIT_CASES, UnitCase
from tests.support.units import gate_rows, small_targets, small_units

GOALS = [0.0, 0.1, 0.33, 0.5, 0.75, 0.85]
Rows = list[dict[str, Tensor]]


@pytest.fixture(params=UNIT_CASES)
def case(request: pytest.FixtureRequest) -> UnitCase:
    return UNIT_CASES[request.param]


@pytest.fixture
def targets() -> Targets:
    return small_targets()


@pytest.fixture
def rows() -> Rows:
    return gate_rows(small_units(), 40)


def _masks_of(targets: Targets, *pruned: tuple[str, int]) -> dict[str, Tensor]:
    assert targets.units is not None
    kept = {name: torch.ones(size, dtype=torch.bool) for name, size in targets.units.sizes.items()}
    for name, unit in pruned:
        kept[name][unit] = False
    return targets.units.masks(targets.shapes, kept)


def _kept(result: PruneResult, targets: Targets) -> dict[str, int]:
    assert targets.units is not None
    return {name: int(kept.sum()) for name, kept in targets.units.kept(result.masks).items()}


def _check(result: PruneResult, targets: Targets) -> None:
    """What holds of every result."""
    assert list(result.weights) == list(result.masks) == list(targets)
    for name, weight in targets.items():
        assert result.weights[name].shape == result.masks[name].shape == weight.shape
        assert result.weights[name].dtype == weight.dtype
        assert result.weights[name].isfinite().all()
        assert not result.weights[name][~result.masks[name]].any()
        assert not result.weights[name].requires_grad
    zeros = sum(int((~mask).sum()) for mask in result.masks.values())
    assert result.sparsity == pytest.approx(zeros / targets.numel)
    assert math.isfinite(result.saliency)
    assert result.saliency >= 0


@pytest.mark.parametrize("cost", [Parameters(), Flops()])
def test_goals_are_met_to_one_unit(case: UnitCase, targets: Targets, rows: Rows, cost: Parameters | Flops) -> None:
    pruner = case.pruner(cost=cost)
    path, prices = case.path(targets, rows, pruner=pruner), pruner.prices(targets)
    for goal in GOALS:
        result = path.at(goal)
        _check(result, targets)
        kept = _kept(result, targets)
        assert min(kept.values()) >= 1
        assert result.stats["saved"] == pytest.approx(prices.saved_share(kept))
        assert prices.saved_share(kept) >= goal - 1e-9
        assert pruner.reached(targets, result.masks) == pytest.approx(prices.saved_share(kept))
        taken = path.removals[: int(result.stats["units"])]
        if taken:
            one_more = {**kept, taken[-1].group: kept[taken[-1].group] + 1}
            assert prices.saved_share(one_more) < goal, "one unit fewer would not do"
            assert taken[-1].saved == pytest.approx(prices.saved_share(kept))


def test_nothing_but_a_loss_is_called_one(case: UnitCase, targets: Targets, rows: Rows) -> None:
    for goal in (0.0, 0.5):
        result = case.path(targets, rows).at(goal)
        assert result.predicted_loss == (result.saliency if case.predicts_loss else None)


def test_what_is_pruned_stays_pruned(case: UnitCase, targets: Targets, rows: Rows) -> None:
    """Units as a whole, and single zeros of another pruner in units that are kept."""
    pruned = [("fc1", 3), ("fc1", 7), ("attn", 1), ("conv1", 0)]
    single = random_masks(targets, 0.2)
    masks = {name: mask & single[name] for name, mask in _masks_of(targets, *pruned).items()}
    pruner = case.pruner()
    path = case.path(targets, rows, masks, pruner=pruner)
    assert path.sparsity == pytest.approx(1 - sum(int(m.sum()) for m in masks.values()) / targets.numel)
    assert pruner.reached(targets, masks) == pruner.prices(targets).saved_share(
        {"fc1": 10, "attn": 3, "conv1": 5, "conv2": 5}
    )
    for goal in (0.33, 0.5, 0.75):
        result = path.at(goal)
        _check(result, targets)
        assert all(not (result.masks[name] & ~mask).any() for name, mask in masks.items())
        assert {(r.group, r.unit) for r in path.removals}.isdisjoint(pruned)


def test_masks_are_nested_and_loss_grows(case: UnitCase, targets: Targets, rows: Rows) -> None:
    path = case.path(targets, rows)
    assert path.nested
    results = [path.at(goal) for goal in GOALS]
    for less, more in pairwise(results):
        assert all(not (more.masks[n] & ~less.masks[n]).any() for n in targets)
        assert less.saliency < more.saliency
    assert results[0].saliency == 0
    assert all(torch.equal(results[0].weights[n], w) for n, w in targets.items())


def test_path_is_never_consumed_and_curve_tells_the_same(case: UnitCase, targets: Targets, rows: Rows) -> None:
    path = case.path(targets, rows)
    first = [path.at(goal) for goal in GOALS]
    again = [path.at(goal) for goal in reversed(GOALS)][::-1]
    assert all(same_result(a, b) for a, b in zip(first, again, strict=True))
    assert path.curve(GOALS) == [result.saliency for result in first]
    assert path.curve([]) == []
    first[3].weights["fc1.weight"].zero_()
    first[0].weights["fc1.weight"].zero_()  # the caller may do what he likes with what he got
    first[0].masks["fc1.weight"].zero_()
    assert same_result(path.at(GOALS[1]), again[1])
    assert same_result(path.at(0.0), again[0])


def test_model_changes_only_when_applied(case: UnitCase, targets: Targets, rows: Rows) -> None:
    before, chunks = copy.deepcopy(targets.weights()), copy.deepcopy(rows)
    masks = _masks_of(targets, ("fc1", 0))
    given = copy.deepcopy(masks)
    result = case.path(targets, rows, masks).at(0.5)
    assert all(torch.equal(w, before[n]) and w.requires_grad and w.grad is None for n, w in targets.items())
    assert all(torch.equal(a[n], b[n]) for a, b in zip(chunks, rows, strict=True) for n in a)
    assert all(torch.equal(masks[n], given[n]) for n in masks)
    result.apply(targets)
    assert all(torch.equal(w, result.weights[n]) and w.requires_grad for n, w in targets.items())


def test_what_is_applied_is_found_again(case: UnitCase, targets: Targets, rows: Rows) -> None:
    """Zeros of the model tell the masks, also in the next event, which prunes further."""
    first = case.path(targets, rows).at(0.4)
    first.apply(targets)
    masks = MaskSet(targets)
    masks.mask_zeros()
    assert all(torch.equal(masks[name], first.masks[name]) for name in targets)
    second = case.path(targets, rows, masks).at(0.7)
    assert all(not (second.masks[n] & ~first.masks[n]).any() for n in targets)


def test_is_deterministic(case: UnitCase, targets: Targets, rows: Rows) -> None:
    state = torch.get_rng_state()
    one, two = (case.path(targets, rows).at(0.6) for _ in range(2))
    assert same_result(one, two)
    assert torch.equal(torch.get_rng_state(), state)


def test_kept_weights_change_only_where_the_method_updates(case: UnitCase, targets: Targets, rows: Rows) -> None:
    result = case.path(targets, rows).at(0.5)
    moved = {n for n, w in targets.items() if (result.weights[n] != torch.where(result.masks[n], w, 0.0)).any()}
    assert bool(moved) == case.updates


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_weights(case: UnitCase, rows: Rows, dtype: torch.dtype) -> None:
    targets = small_targets(dtype)
    path = case.path(targets, [{n: g.to(dtype) for n, g in chunk.items()} for chunk in rows])
    _check(path.at(0.5), targets)
    dense = path.at(0.0)
    assert all(torch.equal(dense.weights[n], w) for n, w in targets.items())


def test_gradients_that_are_all_zero_are_refused(case: UnitCase, targets: Targets, rows: Rows) -> None:
    zero = [{n: torch.zeros_like(g) for n, g in chunk.items()} for chunk in rows]
    if case.reads == "nothing":
        case.path(targets, zero).at(0.5)
        return
    with pytest.raises(GradientError, match=rf"^{case.reads}: all 40 are zero, .* for all 4 targets\. Check the"):
        case.path(targets, zero)


def test_a_group_without_gradients_is_told_and_not_updated(case: UnitCase, targets: Targets, rows: Rows) -> None:
    some = [{n: torch.zeros_like(g) if n == "fc1" else g for n, g in chunk.items()} for chunk in rows]
    if case.reads == "nothing":
        return
    with pytest.warns(UserWarning, match="all 40 are zero for 1 of 4 targets, first 'fc1'"):
        path = case.path(targets, some)
    result = path.at(0.5)
    assert torch.equal(result.weights["fc2.weight"], targets["fc2.weight"] * result.masks["fc2.weight"])


def test_more_than_asked_for_warns_and_changes_nothing(case: UnitCase, targets: Targets, rows: Rows) -> None:
    masks = _masks_of(targets, *(("conv1", unit) for unit in range(4)))
    pruner = case.pruner()
    path = case.path(targets, rows, masks, pruner=pruner)
    assert pruner.exceeds(0.1, targets, masks)
    assert not pruner.exceeds(0.3, targets, masks), "by less than one unit"
    with pytest.warns(UserWarning, match=r"sparsity=0\.1: the model is already at 0\.3.*ask for more"):
        result = path.at(0.1)
    assert result.saliency == 0
    assert all(torch.equal(result.masks[n], masks[n]) for n in targets)
    assert all(torch.equal(result.weights[n], w * masks[n]) for n, w in targets.items())


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.1, 50, float("nan"), "0.5", None])
def test_goals_outside_are_refused(case: UnitCase, targets: Targets, rows: Rows, sparsity: float) -> None:
    pruner = case.pruner()
    path = case.path(targets, rows, pruner=pruner)
    for ask in (path.at, pruner.check_sparsity, lambda s: path.curve([0.5, s])):
        with pytest.raises(PatternError, match=r"sparsity=.*\[0, 1\)"):
            ask(sparsity)


@pytest.mark.parametrize("cost", [Parameters(), Flops()])
def test_goals_beyond_the_last_units_are_refused(
    case: UnitCase, targets: Targets, rows: Rows, cost: Parameters | Flops
) -> None:
    pruner = case.pruner(cost=cost)
    prices = pruner.prices(targets)
    most = prices.saved_share(dict.fromkeys(small_units(), 1))
    pruner.check_goals(targets, None, [most - 1e-6])
    path = case.path(targets, rows, pruner=pruner)
    assert _kept(path.at(most - 1e-6), targets) == dict.fromkeys(small_units(), 1)
    for ask in (path.at, lambda goal: pruner.check_goals(targets, None, [0.5, goal])):
        with pytest.raises(ConfigError, match=rf"{cost.name}=0\.999: .*{most:.4g}"):
            ask(0.999)


@pytest.mark.parametrize("allocation", [Global(min_density=0.5), Uniform(min_density=0.5)])
def test_the_floor_holds(case: UnitCase, targets: Targets, rows: Rows, allocation: Global | Uniform) -> None:
    pruner = case.kind(**{**case.own, "allocation": allocation})
    path = case.path(targets, rows, pruner=pruner)
    least = {"conv1": 3, "conv2": 3, "attn": 2, "fc1": 6}
    most = pruner.prices(targets).saved_share(least)
    assert _kept(path.at(most - 1e-9), targets) == least
    with pytest.raises(ConfigError, match=r"sparsity=0\.9: even with min_density=0\.5 the model costs .* of 757"):
        pruner.check_goals(targets, None, [0.9])
    masks = _masks_of(targets, *(("fc1", unit) for unit in range(10)))
    assert _kept(case.path(targets, rows, masks, pruner=pruner).at(most - 1e-9), targets)["fc1"] == 2, (
        "below the floor already"
    )


def test_uniform_takes_the_same_share_of_every_group(case: UnitCase, targets: Targets, rows: Rows) -> None:
    if not case.uniform:
        return
    for goal in GOALS:
        kept = _kept(case.path(targets, rows).at(goal), targets)
        shares = [1 - kept[name] / size for name, size in small_units().sizes.items()]
        assert max(shares) - min(shares) <= 0.26, "one head of four"


def test_targets_without_units_are_refused(case: UnitCase, targets: Targets, rows: Rows) -> None:
    plain = Targets(dict(targets))
    pruner = case.pruner()
    for ask in (pruner.check, pruner.plan, lambda t: pruner.path(t, rows), lambda t: pruner.reached(t, None)):
        with pytest.raises(TargetError, match=r"no units in them.*Units\.from_model\(model, example_input\)"):
            ask(plain)


def test_masks_and_rows_that_do_not_fit_are_refused(case: UnitCase, targets: Targets, rows: Rows) -> None:
    pruner = case.pruner()
    with pytest.raises(ConfigError, match=r"masks: 'nothing'.*there is no such target"):
        pruner.path(targets, rows, {"nothing": torch.ones(2, dtype=torch.bool)})
    if case.reads != "gradients":
        return
    for wrong in ([{**rows[0], "fc1": rows[0]["fc1"][:, 1:]}], [{"fc1": rows[0]["fc1"]}], [], ["a"]):
        with pytest.raises(GradientError, match="gradients: "):
            pruner.path(targets, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_and_gradients_are_refused(case: UnitCase, targets: Targets, rows: Rows, value: float) -> None:
    if case.reads != "nothing":
        broken = [{**rows[0], "fc1": torch.full_like(rows[0]["fc1"], value)}]
        with pytest.raises(GradientError, match="not finite"):
            case.path(targets, broken)
    with torch.no_grad():
        targets["conv2.weight"][0, 1, 1, 2] = value
    with pytest.raises(CAPError, match=r"'conv2\.weight' is not finite"):
        case.path(targets, rows)


def test_plans_closed_paths_and_repr(case: UnitCase, targets: Targets, rows: Rows) -> None:
    pruner = case.pruner()
    assert pruner.takes_units
    assert pruner.plan(targets).peak_bytes > 0
    assert repr(pruner).startswith(f"{case.kind.__name__}(")
    with case.path(targets, rows, pruner=pruner) as path:
        assert isinstance(path, PruningPath)
        assert repr(path) == "UnitPath(12 targets of 757 weights, from sparsity 0.0000)"
        path.at(0.5)
    path.close()  # twice is no error
    with pytest.raises(GradientError, match="closed"):
        path.at(0.5)


@pytest.mark.parametrize("name", [name for name, case in UNIT_CASES.items() if case.updates])
def test_weights_beyond_their_type_are_refused(name: str, rows: Rows) -> None:
    targets = small_targets(torch.float16)
    with torch.no_grad():
        targets["fc2.weight"].fill_(6e4)
    alike = [{**chunk, "fc1": torch.ones_like(chunk["fc1"])} for chunk in rows]  # one gate takes over from all others
    with pytest.raises(UnsupportedError, match=r"'fc2.weight'.* is beyond 65504, the largest number of torch.float16"):
        UNIT_CASES[name].path(targets, alike).at(0.85)
