"""Shows the phases of a pruning event in the trainer's own progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich.markup import escape

from lightning_cap.kernels.compiling import when_compiling
from lightning_cap.trainer import compat
from lightning_cap.utilities.progress import Progress
from lightning_cap.utilities.remaining import Remaining, format_seconds
from lightning_cap.utilities.stopping import poll

_COMPILING = "compiling the solver for this machine, which takes a moment"

Draw = Callable[[str, int, int], None]


@contextmanager
def event_progress(
    trainer: pl.Trainer, title: str, clock: Callable[[], float] = time.perf_counter
) -> Iterator[Progress]:
    """A ``progress(phase, done, total)`` for the duration of an event: one line in the Rich or tqdm bar of the run.

    It tells the phase and, as soon as that can be known, how long it will still take; and that code is being compiled, when it
    is, which is told in the log where there is no bar. It raises `StopRequested` as `poll` does.

    Args:
        trainer: Its progress bar callback is asked; without one (or another kind) nothing is shown.
        title: What the line begins with, e.g. ``"CAP 75%"``.
        clock: Gives seconds.
    """
    remaining = Remaining(clock)
    at = ("", 0, 1)
    told = False

    with _line(trainer, title) as draw:

        def show(phase: str, done: int, total: int) -> None:
            nonlocal at
            at = (phase, done, total)
            poll()
            left = remaining(phase, done, total)
            if draw is not None:
                draw(phase if left is None else f"{phase}, {format_seconds(left)} left", done, total)

        def tell() -> None:
            nonlocal told
            if draw is not None:
                draw(_COMPILING, *at[1:])
            elif not told:
                rank_zero_info(f"{title}: {_COMPILING}.")
            told = True

        with when_compiling(tell):
            yield show


@contextmanager
def _line(trainer: pl.Trainer, title: str) -> Iterator[Draw | None]:
    """Draws a line of the trainer's bar; None where there is none."""
    bar: Any = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and compat.rich_lines(bar) is not None:
        lines = compat.rich_lines(bar)
        shown = escape(title)
        task = lines.add_task(f"{shown}: starting", total=1)

        def draw(text: str, done: int, total: int) -> None:
            lines.update(task, description=f"{shown}: {escape(text)}", completed=done, total=total)
            bar.refresh()

        try:
            yield draw
        finally:
            lines.update(task, visible=False)  # not removed: Lightning takes its own lines by their place in the list
            lines.refresh()
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        line = compat.tqdm_line(bar, title, dynamic_ncols=True, file=sys.stdout)

        def write(text: str, done: int, total: int) -> None:
            line.set_description(f"{title}: {text}", refresh=False)
            line.total, line.n = total, done
            line.refresh()

        try:
            yield write
        finally:
            line.close()
    else:
        yield None


def end_bar(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let a Rich bar draw its last state now, so that what is printed next stands below it."""
    if isinstance(trainer.progress_bar_callback, RichProgressBar):
        trainer.progress_bar_callback.teardown(trainer, module, "fit")
