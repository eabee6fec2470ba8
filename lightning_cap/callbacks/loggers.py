"""What the Trainer's loggers are given of an event: numbers under the same names, and pictures where a logger takes them.

What a logger takes is told by the methods that it and its ``experiment`` have. One that has none of them gets the numbers alone.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

from lightning_cap.callbacks.pictures import pixels, saliency_figure, sparsity_figure
from lightning_cap.callbacks.run import is_dry
from lightning_cap.trainer.records import EventRecord
from lightning_cap.trainer.saliency import ScoreHistogram

_log = logging.getLogger(__name__)

SPARSITY, SALIENCY = "cap/sparsity_by_layer", "cap/log10_saliency"

_REFUSED = re.compile(r"[^a-zA-Z0-9_/. -]")  # by MLflow; others take fewer, and put something else there themselves
_LONGEST = 250  # likewise

Picture = Callable[[str, Any, int], None]


def log_numbers(trainer: pl.Trainer, numbers: Mapping[str, float]) -> None:
    """Log numbers to every logger, under names that all of them take.

    Args:
        trainer: Whose loggers are told.
        numbers: By name.
    """
    named = accepted(numbers)
    for logger in trainer.loggers:
        logger.log_metrics(named, step=trainer.global_step)


def accepted(numbers: Mapping[str, float]) -> dict[str, float]:
    """The numbers under names that every logger takes.

    A character that some logger refuses is ``_`` instead, and so are parts between slashes that a path would lose. Where a name is
    that of a folder for others too, ``_`` comes behind it: MLflow keeps a file for each. Names that would be the same get a
    number.
    """
    found: dict[str, float] = {}
    for name, value in numbers.items():
        parts = [_REFUSED.sub("_", part) for part in name.split("/")]
        plain = "/".join("_" if part.strip(".") == "" else part for part in parts)[:_LONGEST]
        unique, number = plain, 2
        while unique in found:
            unique, number = f"{plain[: _LONGEST - 4]}-{number}", number + 1
        found[unique] = value
    folders = {name[:i] for name in found for i, letter in enumerate(name) if letter == "/"}
    return {f"{name}_" if name in folders else name: value for name, value in found.items()}


class Pictures:
    """Gives pictures of events to the loggers that take them.

    What goes wrong with a picture is no reason to end a run, nor to be silent: it is told once for each logger, as a warning, and
    that logger gets no more of them.
    """

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def log(self, trainer: pl.Trainer, record: EventRecord, saliency: ScoreHistogram | None) -> None:
        """Log what an event did to every logger that takes pictures. For any rank alone; only rank 0 does anything.

        Args:
            trainer: Whose loggers are told.
            record: What the event did.
            saliency: What weights were ranked by in it.
        """
        told = trainer.loggers if trainer.is_global_zero and not is_dry(trainer) else ()
        for place, logger in enumerate(told):
            name = f"{type(logger).__name__} {place}"
            if name in self._failed:
                continue
            try:
                _log_pictures(logger, record, saliency, trainer.global_step)
            except Exception as error:
                self._failed.add(name)
                _log.warning(
                    "%s did not take a picture of the pruning event (%s: %s). It gets no more of them; the run goes on.",
                    type(logger).__name__,
                    type(error).__name__,
                    error,
                )


def _log_pictures(logger: Logger, record: EventRecord, saliency: ScoreHistogram | None, step: int) -> None:
    image, histogram = _image_of(logger), _histogram_of(logger)
    title = f"Epoch {record.epoch}, goal {record.goal:.4g}"
    if image is not None and record.sparsities:
        image(SPARSITY, sparsity_figure(record.sparsities, title), step)
    if saliency is None:
        return
    if histogram is not None:
        histogram(SALIENCY, saliency, step)
    elif image is not None:
        image(SALIENCY, saliency_figure(saliency, title), step)


def _image_of(logger: Any) -> Picture | None:
    """How a logger takes a figure; None if it does not."""
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_image", None)):  # TensorBoard
        return lambda name, figure, step: experiment.add_image(name, pixels(figure), step, dataformats="HWC")
    if callable(getattr(logger, "log_image", None)):  # W&B
        return lambda name, figure, step: logger.log_image(name, [pixels(figure)], step)
    if callable(getattr(experiment, "log_figure", None)) and hasattr(logger, "run_id"):  # MLflow
        return lambda name, figure, step: experiment.log_figure(logger.run_id, figure, f"{name}/step-{step:08d}.png")
    return None


def _histogram_of(logger: Any) -> Picture | None:
    """How a logger takes a histogram; None if it does not."""
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_histogram_raw", None)):
        return lambda name, scores, step: _add_raw(experiment, name, scores, step)
    if callable(getattr(logger, "log_image", None)) and type(experiment).__module__.startswith("wandb."):
        wandb = importlib.import_module("wandb")
        return lambda name, scores, step: logger.log_metrics(
            {name: wandb.Histogram(np_histogram=(list(scores.counts), list(scores.edges)))}, step
        )
    return None


def _add_raw(experiment: Any, name: str, scores: ScoreHistogram, step: int) -> None:
    edges, counts = scores.edges, scores.counts
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    experiment.add_histogram_raw(
        name,
        min=scores.low,
        max=scores.high,
        num=sum(counts),
        sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
        sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
        bucket_limits=list(edges[1:]),
        bucket_counts=list(counts),
        global_step=step,
    )
