"""Shows the phases of a pruning event in the trainer's own progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.markup import escape

from lightning_cap.trainer import compat
from lightning_cap.utilities.progress import Progress


def _silent(phase: str, done: int, total: int) -> None:
    """Where there is no bar to show progress in."""


@contextmanager
def event_progress(trainer: pl.Trainer, title: str) -> Iterator[Progress]:
    """A ``progress(phase, done, total)`` for the duration of an event: one line in the Rich or tqdm bar of the run.

    Args:
        trainer: Its progress bar callback is asked; without one (or another kind) nothing is shown.
        title: What the line begins with, e.g. ``"CAP 75%"``.
    """
    bar: Any = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and compat.rich_lines(bar) is not None:
        lines = compat.rich_lines(bar)
        shown = escape(title)
        task = lines.add_task(f"{shown}: starting", total=1)

        def show(phase: str, done: int, total: int) -> None:
            lines.update(task, description=f"{shown}: {phase}", completed=done, total=total)
            bar.refresh()

        try:
            yield show
        finally:
            lines.update(task, visible=False)  # not removed: Lightning takes its own lines by their place in the list
            lines.refresh()
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        line = compat.tqdm_line(bar, title, dynamic_ncols=True, file=sys.stdout)

        def write(phase: str, done: int, total: int) -> None:
            line.set_description(f"{title}: {phase}", refresh=False)
            line.total, line.n = total, done
            line.refresh()

        try:
            yield write
        finally:
            line.close()
    else:
        yield _silent


def end_bar(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let a Rich bar draw its last state now, so that what is printed next stands below it."""
    if isinstance(trainer.progress_bar_callback, RichProgressBar):
        trainer.progress_bar_callback.teardown(trainer, module, "fit")
