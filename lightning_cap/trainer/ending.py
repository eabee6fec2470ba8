"""A run that is told to end, by SIGTERM or by SLURM, in a pruning event: the event is abandoned, on all processes together."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import TypeVar

import lightning.pytorch as pl

from lightning_cap.trainer import compat
from lightning_cap.utilities import distributed, rng
from lightning_cap.utilities.stopping import StopRequested, watch

T = TypeVar("T")


class HeldSignals:
    """Holds back, in its body, the signals that Lightning ends or saves a run by; `poll` raises there as soon as one has come.

    Lightning's own answers communicate, or write a checkpoint, wherever the process is: in the midst of an event the processes
    would wait for one another for ever, or the checkpoint would hold half an event. Every rank must enter it.

    Args:
        trainer: In ``fit``.

    Attributes:
        told: After `agree`: the signals that any of the processes has got, the same on all of them.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._handlers: dict[int, compat.Handler] = {}
        self._before = bool(trainer.received_sigterm)  # it came before this
        self._got: dict[int, FrameType | None] = {signal.SIGTERM: None} if self._before else {}
        self.told: list[int] = []

    def __enter__(self) -> HeldSignals:
        self._handlers = compat.ending_handlers(self._trainer)
        for number in self._handlers:
            signal.signal(number, self._note)
        return self

    def polled(self) -> AbstractContextManager[None]:
        """A part of the body in which `poll` raises."""
        return watch(self._reason)

    def agree(self) -> None:
        """Learn which signals came to any of the processes. Every rank must call it."""
        self.told = sorted({number for got in distributed.gather_objects(list(self._got)) for number in got})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if error is not None and signal.SIGTERM in self._got:
            self._take_sigterm()
        elif error is None:
            for number in self._got.keys() - set(self.told):  # it came when the others had been asked
                signal.raise_signal(number)

    def obey(self) -> bool:
        """Do what Lightning does at the signals that have come, on all ranks together. Returns whether the run is to end."""
        ends = False
        for number in self.told:
            if number == signal.SIGTERM:
                ends = True
                self._take_sigterm()
            elif number in self._handlers:  # SLURM's: a checkpoint is saved, and the job is queued again
                self._handlers[number](number, self._got.get(number))
        return ends

    def _take_sigterm(self) -> None:
        got = signal.SIGTERM in self._got
        handler = self._handlers.get(signal.SIGTERM) if got and not self._before else None
        compat.note_sigterm(self._trainer, handler, self._got.get(signal.SIGTERM))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and number not in self._got:
            compat.pass_on_signal(self._trainer, number)
        self._got[number] = frame

    def _reason(self) -> str | None:
        return f"signal {min(self._got)}" if self._got else None


def run_unless_told(
    trainer: pl.Trainer, work: Callable[[], T], end: Callable[[T | None], None]
) -> tuple[T | None, bool]:
    """Do work that leaves everything as it was where it raises `StopRequested`. Every rank must call it.

    Where SLURM asks for a checkpoint meanwhile, the work is abandoned, the checkpoint is saved, and the work is done anew.

    Args:
        trainer: In ``fit``.
        work: Calls `poll` now and then.
        end: Called with what the work returned, if the run is to end; signals that come meanwhile are held back, too.

    Returns:
        What the work returned, None if it was abandoned; and whether the run is to end.
    """
    while True:
        before = rng.capture()
        out: T | None = None
        done = True
        ends = False
        with HeldSignals(trainer) as held:
            try:
                with held.polled():
                    out = work()
            except StopRequested:
                done = False
                rng.restore(before)
            held.agree()
            if held.told:
                with compat.before_epoch(trainer):
                    ends = held.obey()
            if ends:
                end(out)
        if done or ends:
            return out, ends
