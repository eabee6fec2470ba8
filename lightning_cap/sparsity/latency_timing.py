"""Times of a model's parts inside it, while it runs at several widths."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_cap.sparsity.latency_parts import Call, Part, shrunk
from lightning_cap.sparsity.latency_passes import Counts, cell_of
from lightning_cap.sparsity.units import Units
from lightning_cap.utilities.progress import Progress
from lightning_cap.utilities.timing import Clock, synchronize

_SECONDS = 30.0  # after which no round begins but for the fewest
_FEWEST, _MOST = 3, 40  # rounds

#: ``(like of a part, units of its groups)`` -> milliseconds, one by one.
Samples = dict[tuple[str, Counts], list[float]]


@dataclass
class Measured:
    """What all passes took.

    Attributes:
        overhead: Of each round: milliseconds that the parts of the dense model took together, less what it took without hooks.
        parts: Of each part at each of its widths.
    """

    overhead: list[float] = field(default_factory=list)
    parts: Samples = field(default_factory=dict)


def measure(
    model: nn.Module,
    units: Units,
    parts: Sequence[Part],
    passes: Sequence[Counts],
    call: Call,
    *,
    device: torch.device,
    progress: Progress,
    clock: Clock = time.perf_counter,
) -> Measured:
    """Run copies of a model at several widths in turns, and take the time of each part in them.

    A part is timed where it belongs, after what comes before it: alone it would find its weights and inputs in the caches of the
    processor, and be too fast. The first round does not count.

    Args:
        model: On ``device``, in eval mode.
        units: Its units.
        parts: What to time.
        passes: Units of each group in each pass, the first one dense.
        call: A forward pass.
        device: What it runs on.
        progress: Told of each round.
        clock: Of what time is taken, on devices without events of their own.
    """
    stopwatch = Stopwatch(device, clock)
    copies = [Timed(shrunk(model, units, dict(enumerate(counts))), parts, stopwatch) for counts in passes]
    found, begun = Measured(), 0.0
    for done in range(_MOST + 1):
        if done == 1:
            found, begun = Measured(), clock()
        spent = clock() - begun
        if done > _FEWEST and spent > _SECONDS:
            break
        progress("timing layers", max(done, round(_MOST * spent / _SECONDS) if done else 0), _MOST + 1)
        for turn in range(len(copies)):
            place = (turn + done) % len(copies)
            before = stopwatch.mark()
            if place == 0:
                call(model)
            alone = stopwatch.milliseconds(before, stopwatch.mark())
            times = copies[place].times(call)
            if place == 0:
                found.overhead.append(sum(times) - alone)
            for part, milliseconds in zip(parts, times, strict=True):
                found.parts.setdefault((part.like, cell_of(part, passes[place])), []).append(milliseconds)
    progress("timing layers", _MOST + 1, _MOST + 1)
    return found


class Stopwatch:
    """Moments on a device: events on CUDA, which it passes without waiting; elsewhere those of a clock, waited for.

    Args:
        device: What is timed.
        clock: For the others.
    """

    def __init__(self, device: torch.device, clock: Clock) -> None:
        self._device, self._clock = device, clock

    def mark(self) -> Any:
        """Now."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        synchronize(self._device)
        return self._clock()

    def milliseconds(self, begin: Any, end: Any) -> float:
        """From one moment to another."""
        if self._device.type == "cuda":
            end.synchronize()
            return float(begin.elapsed_time(end))
        return 1e3 * float(end - begin)


@dataclass
class _Span:
    part: int
    parent: int  # place of the span around it, -1 for none
    begin: Any
    end: Any = None


class Timed:
    """A model whose parts are timed when it runs.

    Args:
        model: Gets hooks.
        parts: By their paths in it.
        stopwatch: Takes the times.
    """

    def __init__(self, model: nn.Module, parts: Sequence[Part], stopwatch: Stopwatch) -> None:
        self._model, self._stopwatch, self._num_parts = model, stopwatch, len(parts)
        self._spans: list[_Span] = []
        self._open: list[int] = []
        modules: Mapping[str, nn.Module] = dict(model.named_modules())
        for place, part in enumerate(parts):
            modules[part.module].register_forward_pre_hook(self._enter(place))
            modules[part.module].register_forward_hook(self._leave)

    def times(self, call: Call) -> list[float]:
        """Milliseconds of each part in one forward pass, those of parts inside it left out."""
        self._spans, self._open = [], []
        call(self._model)
        own = [0.0] * self._num_parts
        for span in self._spans:
            milliseconds = self._stopwatch.milliseconds(span.begin, span.end)
            own[span.part] += milliseconds
            if span.parent >= 0:
                own[self._spans[span.parent].part] -= milliseconds
        return own

    def _enter(self, place: int) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._spans.append(_Span(place, self._open[-1] if self._open else -1, self._stopwatch.mark()))
            self._open.append(len(self._spans) - 1)

        return enter

    def _leave(self, *_: Any) -> None:
        self._spans[self._open.pop()].end = self._stopwatch.mark()
