"""The table of a sweep: what is saved, and the accuracy before and after fine-tuning, as in the paper's table 3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_cap.trainer.run_records import FinetunedRecord
from lightning_cap.utilities.arguments import require_instance, require_list, require_text


def print_sweep(records: Sequence[FinetunedRecord], folder: str, console: Console | None = None) -> None:
    """Print a line for each checkpoint: sparsity, FLOPs saved, the metric before and after, and the gain.

    An accuracy between 0 and 1 is shown in percent. The arrow says which way the metric went.

    Args:
        records: Of the checkpoints.
        folder: Where the fine-tuned ones are; told below.
        console: Where to. Default: standard output.

    Raises:
        ConfigError: An argument is something else.
    """
    require_list("records", records, "read_records(path, FinetunedRecord)")
    for record in records:
        require_instance("records", record, FinetunedRecord, "records of read_records(path, FinetunedRecord)")
    require_text("folder", folder, "runs/digits/version_0/finetuned")
    require_instance("console", console, Console, "rich.console.Console()", optional=True)
    metrics = list(dict.fromkeys(record.metric for record in records))
    percent = all(_is_share(record) for record in records)
    table = Table(title="Fine-tuned models", caption=Text(f"in {folder}"))
    heading = f"{', '.join(metrics)}{' (%)' if percent else ''}"
    for name in ("sparsity (%)", "FLOPs saved (%)", heading, "gain", "epochs"):
        table.add_column(Text(name), justify="right")
    table.add_column("of", overflow="fold")
    for record in records:
        saved = "-" if record.flops_saved is None else f"{100 * record.flops_saved:.1f}"
        table.add_row(
            f"{100 * record.sparsity:.1f}",
            saved,
            *_before_and_after(record, percent),
            str(record.epochs),
            Text(Path(record.source).name),
        )
    (console or Console()).print(table)


def _is_share(record: FinetunedRecord) -> bool:
    """Whether it is an accuracy between 0 and 1."""
    values = [value for value in (record.before, record.after) if value is not None]
    return "acc" in record.metric.lower() and all(0 <= value <= 1 for value in values)


def _before_and_after(record: FinetunedRecord, percent: bool) -> tuple[str, str]:
    """``73.3 (73.6 \u2191)`` and ``+0.3``."""
    scale, digits = (100, 1) if percent else (1, 4)
    told = ["-" if value is None else f"{scale * value:.{digits}f}" for value in (record.before, record.after)]
    if record.before is None or record.after is None:
        return f"{told[0]} ({told[1]})", "-"
    gain = scale * (record.after - record.before)
    arrow = " \u2191" if gain > 0 else " \u2193" if gain < 0 else ""
    return f"{told[0]} ({told[1]}{arrow})", f"{gain:+.{digits}f}"
