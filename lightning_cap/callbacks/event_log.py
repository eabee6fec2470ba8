"""What a pruning event tells the loggers, the event file and the console."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_cap.callbacks.loggers import log_numbers
from lightning_cap.callbacks.run_files import RunFiles
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.trainer.event import EventReport
from lightning_cap.trainer.records import EVENTS, EventRecord, Saving
from lightning_cap.utilities import distributed
from lightning_cap.utilities.records import append_record


def event_record(
    epoch: int,
    goal: float,
    report: EventReport,
    masks: MaskSet,
    saving: Saving | None,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> EventRecord:
    """The record of an event.

    Args:
        epoch: Of the event.
        goal: Sparsity to reach, or share to save of what else goals count.
        report: What the event did.
        masks: In force now.
        saving: What they save; None where goals count zeros.
        before: Validation metrics right before the event.
        after: Validation metrics right after it.
    """
    return EventRecord(
        epoch=epoch,
        goal=goal,
        sparsity=report.sparsity,
        saving=saving,
        predicted_loss=report.predicted_loss,
        unit=report.unit,
        samples=report.samples,
        skipped=report.skipped,
        healed_samples=report.healed,
        recalibration_samples=report.recalibrated,
        grown_back=report.grown,
        peak_bytes=report.peak_bytes,
        measured_bytes=report.measured_bytes,
        seconds=report.seconds,
        stats=report.stats,
        before=before,
        after=after,
        sparsities=masks.sparsity(),
    )


def log_event(trainer: pl.Trainer, record: EventRecord, shown: str | None, files: RunFiles | None) -> None:
    """Log an event to every logger as ``cap/...``, to ``events.jsonl`` and, in one line, to the console.

    Records in the file whose epoch is as high or higher are those of a run that was stopped after it and has gone back to a
    checkpoint before it. The new record takes their place, so that the file has one per event. Those of another callback, whose
    goals count something else, stay.

    Args:
        trainer: Whose loggers are told.
        record: What the event did.
        shown: The metric that the console line tells.
        files: Those of the run, None to write none.
    """
    log_numbers(trainer, record.logged())
    with distributed.raise_on_all_ranks(f"Writing {EVENTS}"):
        if trainer.is_global_zero and files is not None:
            append_record(files.events, record, lambda old: old.epoch >= record.epoch and _cost(old) == _cost(record))
    rank_zero_info(_line(record, shown))


def _line(record: EventRecord, shown: str | None) -> str:
    before, after = record.before, record.after
    change = ""
    if shown is not None and shown in before and shown in after:
        change = f"; {shown} {before[shown]:.4f} -> {after[shown]:.4f}"
    skipped = f", {record.skipped} skipped" if record.skipped else ""
    grown = f", {record.grown_back} weights grew back" if record.grown_back else ""
    healed = f", healed by {record.healed_samples} samples" if record.healed_samples else ""
    healed += f", batch norm by {record.recalibration_samples}" if record.recalibration_samples else ""
    predicted = "" if record.predicted_loss is None else f", predicted loss increase {record.predicted_loss:.4g}"
    outcome = f"pruned to {record.sparsity:.2%}" if record.sparsity or not record.grown_back else "masks lifted"
    if record.saving is not None:
        saving = record.saving
        outcome = (
            f"{saving.cost} {saving.share:.2f}, predicted {saving.left}, {record.sparsity:.2%} of their weights pruned"
        )
    return (
        f"Epoch {record.epoch:g}: {outcome} ({record.samples} {record.unit}{skipped}{grown}{healed}, "
        f"{sum(record.seconds.values()):.1f} s){predicted}{change}"
    )


def _cost(record: EventRecord) -> str:
    return "" if record.saving is None else record.saving.cost
