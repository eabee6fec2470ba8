"""The tables of a comparison: on the console, and as Markdown with everything that it was made with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_cap.comparison.records import ComparisonRecord
from lightning_cap.report.figures import draw_all
from lightning_cap.report.records import (
    Records,
    accuracy_name,
    as_given,
    by_label,
    counted,
    goals_of,
    grid_settings,
    in_grid,
    mean_and_deviation,
    metric_values,
    number_first,
    percent,
    require_records,
    unpruned_record,
    value_of,
)
from lightning_cap.utilities.arguments import require_instance, require_path
from lightning_cap.utilities.files import atomic

Cell = Callable[[Records], str]


def report(records: Records, folder: Path | str) -> list[str]:
    """Write ``results.md`` and the pictures of a comparison into the folder that has its ``results.jsonl``.

    Args:
        records: What `lightning_cap.comparison.compare` returned.
        folder: Its folder.

    Returns:
        The names of the files.
    """
    require_records(records)
    require_path("folder", folder, "runs/comparison")
    folder = Path(folder)
    with atomic(folder / "results.md") as path:
        path.write_text(markdown(records))
    return ["results.md", *draw_all(records, folder)]


def print_comparison(records: Records, console: Console | None = None) -> None:
    """Print mean accuracies, a line for each pruner; with a single pruner, all metrics, a line for each sparsity.

    Where goals count something else than zeros, that is what the lines are of, with what is left of it as the cost predicts it.

    Args:
        records: What `lightning_cap.comparison.compare` returned.
        console: Where to. Default: standard output.
    """
    require_records(records)
    require_instance("console", console, Console, "rich.console.Console()", optional=True)
    labels = by_label(records)
    table = (
        _one_pruner(records)
        if len(labels) == 1
        else Table(title=Text(f"{accuracy_name(records) or 'no metric'} at each {counted(records)}"), padding=(0, 0))
    )
    if len(labels) > 1:
        table.add_column("pruner", overflow="fold")
        header, *lines = by_goal(records, records, _mean(records))
        for name in header[1:]:
            table.add_column(Text(name), justify="right", no_wrap=True)
        for line in lines:
            table.add_row(*map(Text, line))
    (console or Console()).print(table)


def _one_pruner(records: Records) -> Table:
    metrics = list(records[0].metrics)
    (label, goals), unpruned = next(iter(by_label(records).items())), unpruned_record(records)
    table = Table(title=Text(f"One-shot pruning by {label}"))
    cost = next((record.counted for record in records if record.saving is not None), None)
    for name in (*(() if cost is None else (cost, "predicted")), "sparsity", "predicted loss", *metrics):
        table.add_column(Text(name), justify="right")
    whole = next((record.saving.whole for record in records if record.saving is not None), "-")
    for goal, seeds in {**({0.0: [unpruned]} if unpruned else {}), **goals}.items():
        reached = [f"{seeds[0].sparsity:.4f}"] if cost is None else _saved(seeds[0], whole)
        if goal == 0:
            reached[0] = seeds[0].label
        predicted = _number(mean_and_deviation([record.predicted_loss for record in seeds]), ".4g")
        table.add_row(
            *map(Text, reached), predicted, *(_number(mean_and_deviation(metric_values(seeds, m))) for m in metrics)
        )
    return table


def _saved(record: ComparisonRecord, whole: str = "-") -> list[str]:
    """Share saved, what is left as predicted, and zeros; ``whole`` is left of the model as it was, if that was dense."""
    saving = record.saving
    if saving is None:
        return ["-", whole if record.sparsity == 0 else "-", f"{record.sparsity:.4f}"]
    return [f"{saving.share:.4f}", saving.left, f"{record.sparsity:.4f}"]


def markdown(records: Records) -> str:
    """All results as Markdown: accuracies, savings, losses, seconds, grids, and the settings of every pruner.

    Args:
        records: What `lightning_cap.comparison.compare` returned.
    """
    require_records(records)
    given, name = as_given(records), accuracy_name(records)
    seeds = sorted({record.seed for record in given if record.seed is not None})
    unpruned = unpruned_record(records)
    parts = [
        "# Comparison of pruners",
        f"Mean ± standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))})."
        if len(seeds) > 1
        else f"Seed {seeds[0]}.",
        f"## {name or 'Metric'}",
        ""
        if unpruned is None
        else f"{unpruned.label.capitalize()}: {_number(mean_and_deviation(metric_values([unpruned], name)))}.",
        _table(by_goal(records, given, _accuracy(records))),
        *_savings(records),
        "## Increase of the loss",
        "Predicted by the pruner, where it predicts the loss:",
        _table(by_goal(records, given, _predicted, with_unpruned=False)),
        "Measured on calibration samples:",
        _table(by_goal(records, given, _increase("calibration"), with_unpruned=False)),
        "Measured on the validation data:",
        _table(by_goal(records, given, _increase("validation"), with_unpruned=False)),
        "## Seconds",
        "To collect gradients (as if each pruner did so by itself) and to solve, then to read one sparsity.",
        _table(by_goal(records, given, _seconds, with_unpruned=False)),
    ]
    for setting in grid_settings(records):
        parts += [
            f"## Grid over `{setting}`",
            _table(by_goal(records, labelled_by_setting(records, setting), _accuracy(records))),
        ]
    settings = {record.label: record.settings for record in reversed(given)}
    steps = {record.label: record.parameters["num_recomputations"] for record in given}
    parts += ["## Settings", "\n".join(f"- {label}: `{settings[label]}`, {steps[label]} step(s)" for label in steps)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _savings(records: Records) -> list[str]:
    """A section on what is saved, where any goal counts something else than zeros."""
    if all(record.saving is None for record in records):
        return []
    return [
        f"## {counted(records).capitalize()}",
        "Share saved of what goals count, what is left of it as predicted, and the share of zeros:",
        _table(by_goal(records, records, lambda seeds: ", ".join(_saved(seeds[0])), with_unpruned=False)),
    ]


def labelled_by_setting(records: Records, setting: str) -> list[ComparisonRecord]:
    """The records of a grid and of its pruners as given, each with its value in the label, in order."""
    grid = in_grid(records, setting)
    names = list(dict.fromkeys(record.pruner for record in grid))
    every = [record for record in as_given(records) if record.pruner in names] + grid
    every.sort(key=lambda record: (names.index(record.pruner), number_first(value_of(record, setting))))
    return [replace(record, label=f"{record.pruner} {setting}={value_of(record, setting)}") for record in every]


def by_goal(records: Records, chosen: Records, cell: Cell, with_unpruned: bool = True) -> list[list[str]]:
    """Header and lines: a line for each label, with what its goals count if that differs; a column for each goal."""
    goals, unpruned, differs = goals_of(records), unpruned_record(records), counted(records) == "goal"
    lines = [["pruner", *(percent(goal) for goal in goals)]]
    for label, found in by_label(chosen).items():
        counts = next(iter(found.values()))[0].counted
        lines.append(
            [
                f"{label} ({counts})" if differs else label,
                *(cell(found[goal]) if goal in found else "-" for goal in goals),
            ]
        )
    if with_unpruned and unpruned is not None:
        lines[0].insert(1, unpruned.label)
        for line in lines[1:]:
            line.insert(1, cell([unpruned]))
    return lines


def _accuracy(records: Records) -> Cell:
    name = accuracy_name(records)
    return lambda seeds: _number(mean_and_deviation(metric_values(seeds, name)))


def _mean(records: Records) -> Cell:
    """Short, for the console."""
    name = accuracy_name(records)
    return lambda seeds: "-" if (v := mean_and_deviation(metric_values(seeds, name))) is None else f"{v[0]:.4f}"


def _predicted(seeds: Records) -> str:
    return _number(mean_and_deviation([record.predicted_loss for record in seeds]), ".3g")


def _increase(kind: str) -> Cell:
    return lambda seeds: _number(mean_and_deviation([record.loss_increase.get(kind) for record in seeds]), ".3g")


def _seconds(seeds: Records) -> str:
    columns = ([record.seconds.get(phase) for record in seeds] for phase in ("collect", "solve", "apply"))
    found = [mean_and_deviation(values) for values in columns]
    return " / ".join("-" if value is None else f"{value[0]:.3g}" for value in found)


def _number(value: tuple[float, float] | None, style: str = ".4f") -> str:
    if value is None:
        return "-"
    return f"{value[0]:{style}}" + (f" ± {value[1]:{style if style == '.4f' else '.1g'}}" if value[1] else "")


def _table(lines: Iterable[Sequence[str]]) -> str:
    header, *body = lines
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in (header, rule, *body)
    )
