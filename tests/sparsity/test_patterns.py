from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from torch import nn

from lightning_cap import prune
from lightning_cap.errors import ConfigError, PatternError, TargetError
from lightning_cap.pruners import CAP, DiagonalFisher, FastCAP, Magnitude, Pruner
from lightning_cap.sparsity.patterns import BlockOf, NofM, OutputRows, Pattern, Unstructured, as_pattern, check_pattern
from lightning_cap.sparsity.targets import Targets
from tests.support.pruners import METHODS

HOW = r"in YAML \{class_path: lightning_cap\.sparsity\.NofM, init_args: \{n: 2, m: 4\}\}"


@pytest.mark.parametrize(("n", "m"), [(0, 4), (-1, 4), (4, 4), (5, 4), (0, 0), (1, 1)])
def test_impossible_groups_are_refused(n: int, m: int) -> None:
    with pytest.raises(PatternError, match=rf"n={n}, m={m}: a group of m weights keeps n of them.*{HOW}"):
        NofM(n, m)


@pytest.mark.parametrize("value", ["2", 2.0, True, None, "2:4"])
def test_only_whole_numbers(value: Any) -> None:
    with pytest.raises(PatternError, match=r"^n=.*give a whole number"):
        NofM(value, 4)
    with pytest.raises(PatternError, match=r"^m=.*give a whole number"):
        NofM(1, value)


def test_base_60_numbers_of_yaml_are_recognised() -> None:
    assert yaml.safe_load("2:4") == 124
    with pytest.raises(PatternError, match=rf"n=124, m=4.*124 is what YAML makes of an unquoted 2:4.*{HOW}"):
        NofM(n=124)
    with pytest.raises(PatternError, match="64 is what YAML makes of an unquoted 1:4"):
        NofM(n=64)
    for make in (CAP, lambda pattern: as_pattern(pattern)):
        with pytest.raises(PatternError, match=rf"pattern=124: .*124 is what YAML makes of an unquoted 2:4.*{HOW}"):
            make(pattern=124)
        with pytest.raises(PatternError, match=rf"pattern='2:4': .*NofM\(n=2, m=4\).*{HOW}"):
            make(pattern="2:4")


def test_as_pattern() -> None:
    assert as_pattern(None) == Unstructured()
    assert as_pattern(NofM(1, 4)) is not None
    assert CAP(pattern=NofM(1, 4)).pattern == NofM(1, 4)
    assert CAP().pattern == Unstructured()
    assert Unstructured().group_size == 1
    assert (NofM().n, NofM().m, NofM().group_size) == (2, 4, 4)


def _instantiate(text: str) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--pruner", type=Pruner)
    config = parser.parse_object({"pruner": yaml.safe_load(text)})
    config = parser.parse_object(config.as_dict())  # as a saved config is read back
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return instantiate(config).pruner


def test_from_yaml() -> None:
    pruner = _instantiate(
        "{class_path: lightning_cap.pruners.CAP, init_args: {block_size: 64, ranking: cumulative, "
        "allocation: lightning_cap.sparsity.Uniform, "
        "pattern: {class_path: lightning_cap.sparsity.NofM, init_args: {n: 1, m: 4}}}}"
    )
    assert isinstance(pruner, CAP)
    assert (pruner.pattern, pruner.block_size, pruner.ranking) == (NofM(1, 4), 64, "cumulative")
    assert _instantiate("{class_path: lightning_cap.pruners.CAP}").pattern == Unstructured()
    assert type(_instantiate("{class_path: lightning_cap.pruners.Magnitude}")).__name__ == "Magnitude"


@pytest.mark.parametrize("written", ["pattern: 2:4", "pattern: '2:4'"])
def test_from_yaml_with_a_colon_says_how_to_write_it(written: str) -> None:
    with pytest.raises(Exception, match=HOW) as error:  # jsonargparse may wrap ours
        _instantiate(f"{{class_path: lightning_cap.pruners.CAP, init_args: {{{written}}}}}")
    assert isinstance(error.value, PatternError) or "pattern=" in str(error.value)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan"), float("inf"), 75])
@pytest.mark.parametrize("pattern", [Unstructured(), NofM()])
def test_sparsity_is_a_fraction(pattern: Pattern, sparsity: float) -> None:
    with pytest.raises(PatternError, match=r"sparsity=.*give a number in \[0, 1\)"):
        pattern.check_sparsity(sparsity)


def test_n_of_m_has_one_sparsity() -> None:
    for n, m in [(2, 4), (1, 4), (3, 4), (1, 3), (4, 8), (1, 7)]:
        assert NofM(n, m).sparsity == 1 - n / m
        NofM(n, m).check_sparsity(1 - n / m)
        NofM(n, m).check_sparsity(float(f"{1 - n / m:g}"))  # as the message writes it
    for wrong in (0.0, 0.4, 0.75):
        with pytest.raises(PatternError, match=rf"sparsity={wrong}: NofM\(n=2, m=4\) gives 0\.5 alone"):
            NofM(2, 4).check_sparsity(wrong)
    assert Unstructured().sparsity is None


@given(st.integers(2, 8).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))), st.data())
@settings(max_examples=80, deadline=None)
def test_removing_candidates_to_the_end_makes_the_pattern_hold(nm: tuple[int, int], data: st.DataObject) -> None:
    n, m = nm
    pattern = NofM(n, m)
    bits = data.draw(st.lists(st.booleans(), min_size=6 * m, max_size=6 * m))
    alive = torch.tensor(bits).view(2, 3 * m)
    before = alive.view(-1, m).sum(-1)
    assert pattern.is_satisfied(alive) is bool((before <= n).all())
    while (candidates := pattern.removable(alive)).any():
        assert not (candidates & ~alive).any()
        assert not pattern.is_satisfied(alive)
        first = candidates.flatten().nonzero()[0]
        alive = alive.flatten().scatter(0, first, False).view_as(alive)
    assert pattern.is_satisfied(alive)
    assert torch.equal(alive.view(-1, m).sum(-1), before.clamp_max(n))
    assert Unstructured().is_satisfied(alive)
    assert torch.equal(Unstructured().removable(alive), alive)


# Groups, rows, and the checker of a whole model


@pytest.mark.parametrize("n", [1, 0, -4, True, 4.0, "4", None])
def test_impossible_blocks_are_refused(n: Any) -> None:
    with pytest.raises(PatternError, match=r"^n=.*a whole number of at least 2, such as 4"):
        BlockOf(n)


def test_what_groups_and_rows_say_of_themselves() -> None:
    assert (BlockOf().n, BlockOf(3).group_size, BlockOf(2).whole_groups, BlockOf(2).in_blocks) == (4, 3, True, True)
    assert (OutputRows().group_size, OutputRows().whole_groups, OutputRows().in_blocks) == (1, True, False)
    for pattern in (BlockOf(4), OutputRows()):
        assert pattern.sparsity is None
        assert pattern.kept_in_group is None, "the compiled solvers remove single weights"
        alive = torch.rand(3, 8) > 0.5
        assert torch.equal(pattern.removable(alive), alive)
        with pytest.raises(PatternError, match=r"sparsity=1\.0: give a number"):
            pattern.check_sparsity(1.0)


def test_holds_and_broken_by_hand() -> None:
    kept = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 1, 0]]).bool()
    assert BlockOf(4).count_violations(kept, (2, 8)) == 2
    assert BlockOf(2).count_violations(kept, (2, 8)) == 1
    assert not BlockOf(2).is_satisfied(kept)
    assert BlockOf(4).is_satisfied(kept[:1])
    assert NofM(2, 4).count_violations(kept, (2, 8)) == 2
    assert OutputRows().count_violations(kept, (2, 8)) == 2
    assert OutputRows().is_satisfied(kept[:, :2])
    assert OutputRows().units(kept, (4, 4)).shape == (4, 4)
    assert BlockOf(4).units(kept, (2, 8)).tolist() == kept.view(4, 4).tolist()
    assert NofM(2, 4).units(kept, (2, 8)).shape == (16, 1)
    assert Unstructured().count_violations(kept, (2, 8)) == 0


@given(st.integers(2, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_least_takes_the_smallest_of_every_group(m: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, m - 1))
    alive = torch.tensor(data.draw(st.lists(st.booleans(), min_size=4 * m, max_size=4 * m))).view(2, 2 * m)
    scores = torch.tensor(data.draw(st.permutations(range(-2 * m, 2 * m))), dtype=torch.float32).view(2, 2 * m)
    goes = NofM(n, m).lowest_scores(scores, alive)
    assert not (goes & ~alive).any()
    for s, a, g in zip(scores.view(-1, m), alive.view(-1, m), goes.view(-1, m), strict=True):
        count = max(0, int(a.sum()) - n)
        assert set(s[g].tolist()) == set(sorted(s[a].tolist())[:count])


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 12), nn.Linear(12, 4))


@pytest.mark.parametrize("pattern", [NofM(2, 4), BlockOf(4), BlockOf(2), OutputRows(), Unstructured()], ids=str)
def test_checker_of_a_model_that_was_pruned(pattern: Pattern) -> None:
    model = _model()
    targets = Targets.from_model(model, include=["*"])
    if not isinstance(pattern, NofM):
        check_pattern(targets, pattern)  # dense: every group is whole
    prune(model, [], lambda *_: torch.zeros(()), 0.5, Magnitude(pattern=pattern), include=["*"], progress=False)
    check_pattern(targets, pattern)
    masks = {name: weight != 0 for name, weight in targets.items()}
    masks["0.weight"] = masks["0.weight"].clone()
    flipped = masks["0.weight"][3, :, 1, 2]  # one group of inputs at one place of the kernel
    before, flipped[...] = flipped.clone(), torch.tensor([True, True, True, False])
    if isinstance(pattern, Unstructured):
        check_pattern(targets, pattern, masks)
        return
    with pytest.raises(PatternError, match=r"pattern: 1 groups in 1 of 3 targets break .*'0\.weight' \(1\)"):
        check_pattern(targets, pattern, masks)
    with torch.no_grad():
        model[0].weight[3, :, 1, 2] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    with pytest.raises(PatternError, match="Prune the model with this pattern, or check against the one it was pruned"):
        check_pattern(targets, pattern)
    with torch.no_grad():
        model[0].weight[3, :, 1, 2] = before.float()
    check_pattern(targets, pattern)


def test_checker_counts_and_shortens() -> None:
    weights = {f"layer{i}": torch.ones(2, 8) for i in range(6)}
    with pytest.raises(
        PatternError, match=r"24 groups in 6 of 6 targets break NofM\(n=2, m=4\): 'layer0' \(4\), .*, \.\.\.\."
    ):
        check_pattern(Targets(weights), NofM(2, 4))
    weights["layer5"] = torch.ones(2, 7)
    with pytest.raises(TargetError, match=r"target 'layer5' of shape \(2, 7\).*not divisible"):
        check_pattern(Targets(weights), BlockOf(4))
    check_pattern(Targets(weights), OutputRows())


@pytest.mark.parametrize("name", [name for name, case in METHODS.items() if OutputRows in case.refuses])
def test_who_refuses_what_and_names_another(name: str) -> None:
    with pytest.raises(
        PatternError, match=r"works inside blocks.*Use DiagonalFisher, GradientTimesWeight, Taylor, Magn"
    ):
        METHODS[name].pruner(pattern=OutputRows())
    if METHODS[name].takes(BlockOf(4)):
        assert METHODS[name].pruner(pattern=BlockOf(4), block_size=12).pattern == BlockOf(4)


def test_groups_and_rows_from_yaml() -> None:
    written = "{class_path: lightning_cap.pruners.%s, init_args: {pattern: %s}}"
    one = _instantiate(written % ("WoodFisher", "{class_path: lightning_cap.sparsity.BlockOf, init_args: {n: 8}}"))
    assert one.pattern == BlockOf(8)
    assert _instantiate(written % ("Random", "lightning_cap.sparsity.OutputRows")).pattern == OutputRows()
    with pytest.raises(ConfigError, match="backend='numba' does not know the pattern"):
        CAP(pattern=Pairs(), backend="numba").check(Targets({"a": torch.ones(4, 8)}))
    CAP(pattern=BlockOf(4), backend="numba").check(Targets({"a": torch.ones(4, 8)}))


class Pairs(Pattern):
    """A user's own: of two neighbours one may go, the other not."""

    @property
    def group_size(self) -> int:
        return 2

    @property
    def sparsity(self) -> float | None:
        return None

    def removable(self, alive: torch.Tensor) -> torch.Tensor:
        pairs = alive.view(*alive.shape[:-1], -1, 2)
        return (pairs & pairs.all(-1, keepdim=True)).view_as(alive)

    def is_satisfied(self, kept: torch.Tensor) -> bool:
        return bool(kept.reshape(-1, 2).any(-1).all())


def test_constrained_groups_without_a_sparsity_need_an_elimination() -> None:
    for make in (Magnitude, DiagonalFisher, FastCAP):
        with pytest.raises(PatternError, match=r"and this one is none of them\. Use CAP"):
            make(pattern=Pairs())
    targets = Targets({"a": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))})
    rows = [{"a": torch.randn(20, 4, 8, generator=torch.Generator().manual_seed(1))}]
    result = CAP(block_size=8, num_gradients=20, damp=1e-2, pattern=Pairs()).path(targets, rows).at(0.4)
    check_pattern(targets, Pairs(), result.masks)
    assert int((~result.masks["a"]).sum()) == 13
    with pytest.raises(PatternError, match="1 groups in 1 of 1 targets break"):
        check_pattern(targets, Pairs(), {"a": torch.arange(32).view(4, 8) > 1})
