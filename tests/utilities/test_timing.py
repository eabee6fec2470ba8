from __future__ import annotations

import pytest
import torch

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.timing import quartiles, ratios, time_in_turns, torch_threads
from tests.support.clocks import FakeClock


def test_calls_take_turns_in_an_order_that_turns():
    clock, order = FakeClock(), []

    def call(name: str) -> None:
        order.append(name)
        clock.now += 1e-3

    times = time_in_turns({n: lambda n=n: call(n) for n in "abc"}, clock=clock)
    assert order[:6] == ["a", "b", "c"] * 2  # warm-up, which does not count
    assert order[6:15] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert {name: len(own) for name, own in times.items()} == {"a": 9, "b": 9, "c": 9}  # steady at once
    assert times["a"] == pytest.approx([1.0] * 9)


def test_measuring_goes_on_until_medians_are_known():
    clock = FakeClock()
    times = time_in_turns({"dense": clock.call(10), "other": clock.call(5, 6, 7, 8, 4, 3)}, clock=clock)
    assert len(times["dense"]) == len(times["other"]) == 200


def test_measuring_ends_when_the_time_is_over():
    clock = FakeClock()
    times = time_in_turns({"dense": clock.call(100), "other": clock.call(50, 90)}, seconds=2.0, clock=clock)
    assert len(times["dense"]) == 12  # rounds of 0.15 and 0.19 s

    slow = time_in_turns({"dense": clock.call(30_000), "other": clock.call(20_000)}, seconds=2.0, clock=clock)
    assert len(slow["dense"]) == 1


def test_ratios_are_of_the_same_round():
    assert ratios([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == [2.0, 2.0, 2.0]
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2.0, 3.0, 4.0)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with torch_threads(before + 1) as used:
        assert used == torch.get_num_threads() == before + 1
    with torch_threads(None) as used:
        assert used == before
    assert torch.get_num_threads() == before
    with pytest.raises(ConfigError, match="threads=0"), torch_threads(0):
        pass
