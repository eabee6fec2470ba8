"""How long work will still take, by how long it took so far."""

from __future__ import annotations

import time
from collections.abc import Callable


class Remaining:
    """Estimates, within each phase, the seconds that are left of it.

    The first call of a phase only starts the clock: what came before it, such as compiling, is not typical of the rest.

    Args:
        clock: Gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._phase = ""
        self._started, self._first, self._last = 0.0, 0, 0

    def __call__(self, phase: str, done: int, total: int) -> float | None:
        """Seconds that are left of a phase; None where that cannot be known yet.

        Args:
            phase: Its name. Another one, or one that has less done than before, begins anew.
            done: Of it.
            total: All of it.
        """
        if phase != self._phase or done < self._last:
            self._phase, self._started, self._first = phase, self._clock(), done
        self._last = done
        if done <= self._first or done > total:
            return None
        return (self._clock() - self._started) * (total - done) / (done - self._first)


def format_seconds(seconds: float) -> str:
    """``40 s``, ``3 min 20 s`` or ``2 h 5 min``; ``less than 1 s``."""
    if seconds < 1:
        return "less than 1 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
