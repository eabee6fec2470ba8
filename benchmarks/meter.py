"""Seconds, CPU seconds, peak memory and bytes sent of the phases of a program."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Meter:
    """Adds up what each phase takes; a phase that begins inside another pauses it.

    Args:
        phases: Their names.

    Attributes:
        wall: Seconds by the clock.
        cpu: Seconds of the processor, of all threads of this process.
        peak: Bytes, the most that was resident beyond what was at `start` (Linux only).
        sent: Bytes, as told by `send`.
    """

    def __init__(self, phases: Iterable[str]) -> None:
        self._phases, self._stack = tuple(phases), list[str]()
        self.start()

    def start(self) -> None:
        """Forget what was so far."""
        gc.collect()
        self.wall, self.cpu, self.sent, self.peak = (dict.fromkeys(self._phases, 0.0) for _ in range(4))
        self._resident = status("VmRSS")
        self._mark()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def send(self, size: float) -> None:
        """Add bytes to the phase that runs."""
        self.sent[self._stack[-1]] += size

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return call(*args, **kwargs)

        return wrapped

    def items(self, name: str, source: Iterable[Any]) -> Iterator[Any]:
        """Those of ``source``; the time that it takes to give them is the phase's."""
        chunks = iter(source)
        while True:
            with self.phase(name):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk

    def _charge(self) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        if self._stack:
            name = self._stack[-1]
            self.wall[name] += wall
            self.cpu[name] += cpu
            self.peak[name] = max(self.peak[name], status("VmHWM") - self._resident)
        self._mark()

    def _mark(self) -> None:
        reset = Path("/proc/self/clear_refs")
        if reset.exists():
            reset.write_text("5")  # the high-water mark is that from here on
        self._wall, self._cpu = time.perf_counter(), time.process_time()


def status(field: str) -> int:
    """Bytes by ``/proc/self/status``, 0 where there is none."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":")), 0)
