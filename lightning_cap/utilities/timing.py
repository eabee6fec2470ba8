"""Times of several things, taken in turns so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lightning_cap.utilities.arguments import require_whole

#: Seconds of a clock that only goes forward.
Clock = Callable[[], float]

_WARM_UP = 2  # calls before the first that counts: compiled kernels, caches, memory of the allocator
_FEWEST, _MOST = 9, 200  # rounds
_STEADY = 0.005  # relative standard error of a median at which it is known


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]],
    *,
    device: torch.device | None = None,
    seconds: float = 20.0,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each call, in rounds of one call each. The order turns by one from round to round.

    Rounds end when the medians of all calls, as multiples of the first call's, are known to half a percent, or ``seconds`` are
    over and there were nine rounds. Slow calls get fewer of them: one is enough where a round takes longer than that.

    Args:
        calls: What to time, by name.
        device: What they run on, waited for before and after each call. None: whatever they use is waited for by themselves.
        seconds: Limit, without the two calls of each that come before the first that counts.
        clock: Of what time is taken.

    Returns:
        ``{name: milliseconds}``, of all names equally many; entries of one index were taken next to each other.
    """
    for _ in range(_WARM_UP):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    names, start = list(calls), clock()
    for done in range(_MOST):
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize(device)
            before = clock()
            calls[name]()
            synchronize(device)
            times[name].append(1e3 * (clock() - before))
        spent = clock() - start
        if spent >= seconds and (done + 1 >= _FEWEST or spent >= 2 * seconds):
            break
        if done + 1 >= _FEWEST and all(_is_steady(ratios(times[names[0]], own)) for own in times.values()):
            break
    return times


def synchronize(device: torch.device | None) -> None:
    """Wait until an accelerator has done what it was given; nothing for a CPU."""
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)


def ratios(dense: list[float], other: list[float]) -> list[float]:
    """How many times as fast the other one was, of times that were taken next to each other."""
    return [one / max(two, 1e-9) for one, two in zip(dense, other, strict=True)]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _is_steady(values: list[float]) -> bool:
    low, middle, high = quartiles(values)
    error = (
        1.2533 * (high - low) / 1.349 / math.sqrt(len(values))
    )  # of a median, by the quartiles of a normal distribution
    return error <= _STEADY * middle


@contextmanager
def torch_threads(threads: int | None) -> Iterator[int]:
    """Run the body with so many threads of torch on the CPU, None for those that are set; yields their number.

    Raises:
        ConfigError: It is no whole number of at least 1.
    """
    before = torch.get_num_threads()
    if threads is not None:
        require_whole("threads", threads, example=4)
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
