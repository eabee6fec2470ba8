from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_cap.sparsity import Cost, Parameters
from lightning_cap.sparsity.cost import Shapes, steps_to

SHAPES = {"a": (4, 3), "b": (2, 2, 2, 1)}


class Expensive(Cost):
    """A weight of ``a`` costs three, one of ``b`` one."""

    def prices(self, shapes: Shapes) -> dict[str, int]:
        return {"a": 3, "b": 1}


def test_parameters_count_weights() -> None:
    cost = Parameters()
    assert cost.total(SHAPES) == 20
    assert cost.saved(SHAPES, {"a": 5, "b": 2}) == 7
    assert cost.budget(0.5, 20) == 10


def test_prices_weigh_the_targets() -> None:
    cost = Expensive()
    assert cost.total(SHAPES) == 3 * 12 + 8
    assert cost.saved(SHAPES, {"a": 5, "b": 2}) == 17


@given(st.floats(0, 0.999), st.integers(1, 10**7))
def test_a_goal_is_reached_at_its_own_budget_and_exceeded_by_one_more(goal: float, total: int) -> None:
    cost = Parameters()
    budget = cost.budget(goal, total)
    assert budget == math.floor(Fraction(str(goal)) * total + Fraction(1, 2))
    assert not cost.is_exceeded(goal, budget, total)
    assert cost.is_exceeded(goal, budget + 1, total)


@given(st.floats(0, 0.9), st.floats(0, 0.99), st.integers(1, 12))
def test_linear_steps_are_even_and_end_at_the_goal(start: float, goal: float, num_steps: int) -> None:
    steps = steps_to(goal, start, num_steps, path="linear")
    assert len(steps) == num_steps
    assert steps[-1] == goal
    for number, step in enumerate(steps, start=1):
        assert step == pytest.approx(start + (goal - start) * number / num_steps)


@given(st.floats(0, 0.99), st.floats(0, 0.99), st.integers(1, 12))
def test_each_exponential_step_keeps_the_same_share_of_the_one_before(
    start: float, goal: float, num_steps: int
) -> None:
    steps = [start, *steps_to(goal, start, num_steps)]
    assert len(steps) == num_steps + 1
    assert steps[-1] == goal
    assert steps == sorted(steps, reverse=goal < start)
    factor = ((1 - goal) / (1 - start)) ** (1 / num_steps)
    for before, after in itertools.pairwise(steps):
        assert 1 - after == pytest.approx(factor * (1 - before))


def test_steps_to_nothing_are_even() -> None:
    assert steps_to(1.0, 0.0, 4) == [0.25, 0.5, 0.75, 1.0]
