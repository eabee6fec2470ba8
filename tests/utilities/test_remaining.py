"""Seconds that are left, on a clock that tests move."""

from __future__ import annotations

import pytest

from lightning_cap.utilities.remaining import Remaining, format_seconds
from tests.support.clocks import FakeClock


def test_as_fast_as_so_far() -> None:
    clock = FakeClock()
    left = Remaining(clock)
    assert left("collect", 0, 100) is None
    clock.now = 2.0
    assert left("collect", 10, 100) == pytest.approx(18.0)
    clock.now = 3.0
    assert left("collect", 60, 100) == pytest.approx(2.0)
    assert left("collect", 100, 100) == 0.0


def test_what_comes_before_the_first_word_of_a_phase_is_not_typical() -> None:
    clock = FakeClock()
    left = Remaining(clock)
    clock.now = 60.0  # compiled, and solved the first chunk
    assert left("solve", 5, 25) is None
    clock.now = 61.0
    assert left("solve", 10, 25) == pytest.approx(3.0)


def test_every_phase_and_every_turn_of_it_begins_anew() -> None:
    clock = FakeClock()
    left = Remaining(clock)
    left("collect", 0, 10)
    clock.now = 100.0
    assert left("solve", 0, 10) is None
    clock.now = 101.0
    assert left("solve", 5, 10) == pytest.approx(1.0)
    assert left("solve", 0, 10) is None, "the next recomputation"
    clock.now = 102.0
    assert left("solve", 5, 10) == pytest.approx(1.0)


def test_what_cannot_be_known() -> None:
    left = Remaining(FakeClock())
    assert left("collect", 0, 0) is None
    assert left("collect", 5, 3) is None, "more than there is"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "less than 1 s"), (12.4, "12 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (7500, "2 h 5 min")],
)
def test_written_out(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
