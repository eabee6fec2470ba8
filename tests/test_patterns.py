from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lightning_cap.errors import PatternError
from lightning_cap.patterns import NofM, Pattern, Unstructured, as_pattern
from lightning_cap.pruners import CAP, Pruner

HOW = r"in YAML \{class_path: lightning_cap\.patterns\.NofM, init_args: \{n: 2, m: 4\}\}"


@pytest.mark.parametrize(("n", "m"), [(0, 4), (-1, 4), (4, 4), (5, 4), (0, 0), (1, 1)])
def test_impossible_groups_are_refused(n: int, m: int) -> None:
    with pytest.raises(PatternError, match=rf"n={n}, m={m}: a group of m weights keeps n of them.*{HOW}"):
        NofM(n, m)


@pytest.mark.parametrize("value", ["2", 2.0, True, None, "2:4"])
def test_only_whole_numbers(value: Any) -> None:
    with pytest.raises(PatternError, match=r"^n=.*give two integers"):
        NofM(value, 4)
    with pytest.raises(PatternError, match=r"^m=.*give two integers"):
        NofM(1, value)


def test_base_60_numbers_of_yaml_are_recognised() -> None:
    assert yaml.safe_load("2:4") == 124
    with pytest.raises(PatternError, match=rf"n=124, m=4.*124 is what YAML makes of an unquoted 2:4.*{HOW}"):
        NofM(n=124)
    with pytest.raises(PatternError, match="64 is what YAML makes of an unquoted 1:4"):
        NofM(n=64)
    for make in (CAP, lambda pattern: as_pattern(pattern)):
        with pytest.raises(PatternError, match=rf"pattern=124 .*124 is what YAML makes of an unquoted 2:4.*{HOW}"):
            make(pattern=124)
        with pytest.raises(PatternError, match=rf"pattern='2:4' is not a pattern.*NofM\(n=2, m=4\).*{HOW}"):
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
        "allocation: lightning_cap.allocation.Uniform, "
        "pattern: {class_path: lightning_cap.patterns.NofM, init_args: {n: 1, m: 4}}}}"
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
    with pytest.raises(PatternError, match=r"sparsity=.*fraction of zeros in \[0, 1\)"):
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
    assert pattern.holds(alive) is bool((before <= n).all())
    while (candidates := pattern.candidates(alive)).any():
        assert not (candidates & ~alive).any()
        assert not pattern.holds(alive)
        first = candidates.flatten().nonzero()[0]
        alive = alive.flatten().scatter(0, first, False).view_as(alive)
    assert pattern.holds(alive)
    assert torch.equal(alive.view(-1, m).sum(-1), before.clamp_max(n))
    assert Unstructured().holds(alive)
    assert torch.equal(Unstructured().candidates(alive), alive)
