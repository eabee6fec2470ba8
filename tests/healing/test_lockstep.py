"""Functions that wait for each other."""

from __future__ import annotations

from contextvars import ContextVar

import pytest
import torch

from lightning_cap.healing.lockstep import Lockstep, in_paused_call, pause
from tests.support.healing import waiting_threads

CPU = torch.device("cpu")
VALUE: ContextVar[int] = ContextVar("value", default=0)


def test_calls_go_on_in_turn_from_pause_to_pause() -> None:
    trace: list[str] = []

    def steps(name: str, count: int) -> None:
        assert in_paused_call()
        for i in range(count):
            trace.append(f"{name}{i}")
            pause(i)
        trace.append(f"{name} ends")

    with Lockstep(CPU) as passes:
        for name, count in (("a", 2), ("b", 1), ("c", 2)):
            passes.start(lambda name=name, count=count: steps(name, count))  # type: ignore[misc]
        assert passes.waiting == [0, 0, 0]
        passes.advance()
        assert passes.waiting == [1, None, 1]
        passes.advance()
        passes.advance()
        assert passes.waiting == [None, None, None]
    assert trace == ["a0", "b0", "c0", "a1", "b ends", "c1", "a ends", "c ends"]
    assert not in_paused_call()
    assert not waiting_threads()


def test_an_error_is_raised_where_the_call_is_resumed_and_the_others_end_in_order() -> None:
    left: list[str] = []

    def good(name: str) -> None:
        try:
            pause(1)
        except Exception:
            left.append(f"{name} took the end for an error")
        finally:
            left.append(name)

    def bad() -> None:
        pause(1)
        raise ValueError("original")

    def run() -> None:
        with Lockstep(CPU) as passes:
            for function in (lambda: good("a"), bad, lambda: good("c"), lambda: good("d")):
                passes.start(function)
            passes.advance()

    with pytest.raises(ValueError, match="original"):
        run()
    assert left == ["a", "c", "d"]
    assert not waiting_threads()


def test_an_error_of_the_caller_ends_the_calls_as_well() -> None:
    def run() -> None:
        with Lockstep(CPU) as passes:
            passes.start(lambda: pause(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert not waiting_threads()


def test_each_call_has_its_own_random_state_and_the_context_variables_of_the_caller() -> None:
    found: list[list[float]] = [[], []]
    seen: list[int] = []

    def draw(number: int) -> None:
        seen.append(VALUE.get())
        for _ in range(3):
            found[number].append(float(torch.rand(())))
            pause(number)

    token = VALUE.set(7)
    with Lockstep(CPU) as passes:
        for number in (0, 1):
            torch.manual_seed(number)
            passes.start(lambda number=number: draw(number))  # type: ignore[misc]
        passes.advance()
        passes.advance()
    VALUE.reset(token)
    assert seen == [7, 7]
    for number in (0, 1):
        generator = torch.Generator().manual_seed(number)
        assert found[number] == [float(torch.rand((), generator=generator)) for _ in range(3)]
