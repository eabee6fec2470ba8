"""What a pruning event tells the loggers, the event file and the console."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.trainer.event import EventReport
from lightning_cap.utilities import distributed
from lightning_cap.utilities.files import append_json_line


def log_event(
    trainer: pl.Trainer,
    masks: MaskSet,
    report: EventReport,
    when: dict[str, float],
    before: dict[str, float],
    after: dict[str, float],
    shown: str | None,
    folder: Path | None,
) -> None:
    """Log an event to every logger as ``cap/...``, to ``events.jsonl`` and, in one line, to the console.

    Args:
        trainer: Whose loggers are told.
        masks: In force now; their sparsity is logged for each layer.
        report: What the event did.
        when: ``epoch`` and ``target`` of the event.
        before: Validation metrics right before the event.
        after: Validation metrics right after it.
        shown: The metric that the console line tells.
        folder: Where ``events.jsonl`` is, None to write none.
    """
    row = {
        "sparsity": report.sparsity,
        "predicted_loss": report.predicted_loss,
        report.unit: report.samples,
        f"{report.unit}_skipped": report.skipped,
        "grown_back": report.grown,
        "peak_bytes": report.peak_bytes,
        **report.stats,
        **{f"seconds/{phase}": seconds for phase, seconds in report.seconds.items()},
        **{f"before/{name}": value for name, value in before.items()},
        **{f"after/{name}": value for name, value in after.items()},
        **{f"sparsity/{name}": value for name, value in masks.sparsity().items()},
    }
    for logger in trainer.loggers:
        logger.log_metrics({f"cap/{name}": float(value) for name, value in row.items()}, step=trainer.global_step)
    with distributed.raise_on_all_ranks("Writing events.jsonl"):
        if trainer.is_global_zero and folder is not None:
            append_json_line(folder / "events.jsonl", {**when, **row})
    change = f"; {shown} {before[shown]:.4f} -> {after[shown]:.4f}" if shown in before and shown in after else ""
    skipped = f", {report.skipped} skipped" if report.skipped else ""
    grown = f", {report.grown} weights grew back" if report.grown else ""
    outcome = f"pruned to {report.sparsity:.2%}" if report.sparsity or not report.grown else "masks lifted"
    rank_zero_info(
        f"Epoch {when['epoch']:g}: {outcome} ({report.samples} {report.unit}{skipped}{grown}, "
        f"{sum(report.seconds.values()):.1f} s), predicted loss increase {report.predicted_loss:.4g}{change}"
    )
