from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any


class FakeClock:
    """Stands still but for what its own calls take."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, *milliseconds: float) -> Callable[..., Any]:
        """A function that takes so long, one number after the other."""
        times: Iterator[float] = cycle(milliseconds)

        def work(*args: Any) -> None:
            self.now += next(times) / 1e3

        return work
