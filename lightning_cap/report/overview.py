"""The sections of a page that put several runs and comparisons side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_cap.report.comparison_sections import comparison_lines, dense_value
from lightning_cap.report.parts import Cell, Note, Part, Picture, Pictures, Section, Table
from lightning_cap.report.records import (
    accuracy_name,
    as_given,
    by_label,
    counted,
    mean_and_deviation,
    metric_values,
    percent,
)
from lightning_cap.report.run_folder import Comparison, Run
from lightning_cap.report.run_numbers import RunNumbers
from lightning_cap.report.run_plots import Points, accuracy_plot
from lightning_cap.report.texts import NOTHING, is_share, metric_text


@dataclass
class _Group:
    """What has the same metric, and goals that count the same: it can be drawn in one plot.

    Attributes:
        lines: By label.
        dense: Values before pruning, by label.
        cells: Values by label and goal.
    """

    lines: dict[str, Points] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    cells: dict[str, dict[float, float | None]] = field(default_factory=dict)


def overview_sections(found: Sequence[Run | Comparison], titles: Sequence[str]) -> list[Section]:
    """A plot and a table for all that can be compared.

    Args:
        found: Runs and comparisons.
        titles: Of them.
    """
    groups: dict[tuple[str, str], _Group] = {}
    silent: list[str] = []
    for one, title in zip(found, titles, strict=True):
        key = _add_run(groups, one, title) if isinstance(one, Run) else _add_comparison(groups, one, title)
        if not key:
            silent.append(title)
    sections = [_section(place, *key, group, len(groups) == 1) for place, (key, group) in enumerate(groups.items())]
    if silent:
        note = Note(f"No metric after an event is known yet of: {', '.join(silent)}.")
        sections.append(Section("Not shown", [note]))
    return sections


def _add_run(groups: dict[tuple[str, str], _Group], run: Run, title: str) -> bool:
    """Its cycles' ends, and what fine-tuning gave; whether there is any."""
    numbers = RunNumbers(run)
    ends = {
        cycle.goal: cycle for cycle in sorted(numbers.cycles, key=lambda cycle: not cycle.best)
    }  # ends, else the best
    known = [(goal, cycle) for goal, cycle in sorted(ends.items()) if cycle.value is not None]
    if numbers.metric is None or not known:
        return False
    counts = "sparsity" if run.counted == "sparsity" else f"{run.counted} saved"
    group = groups.setdefault((numbers.metric, counts), _Group())
    reached = [cycle.sparsity if cycle.saving is None else cycle.saving.share for _, cycle in known]
    group.lines[title] = [(x, c.value, 0.0) for x, (_, c) in zip(reached, known, strict=True) if c.value is not None]
    group.cells[title] = {goal: cycle.value for goal, cycle in known}
    if numbers.dense is not None:
        group.dense[title] = numbers.dense
    tuned = [record for record in run.finetuned if record.after is not None]
    if tuned:
        label = f"{title}, fine-tuned"
        group.lines[label] = [(record.sparsity, record.after, 0.0) for record in tuned if record.after is not None]
        group.cells[label] = {record.goal: record.after for record in tuned}
    return True


def _add_comparison(groups: dict[tuple[str, str], _Group], comparison: Comparison, title: str) -> bool:
    """A line for each pruner."""
    records = comparison.records
    name, lines = accuracy_name(records), comparison_lines(records)
    if name is None or not any(lines.values()):
        return False
    counts = "sparsity" if counted(records) == "sparsity" else counted(records).replace("saving of ", "") + " saved"
    group = groups.setdefault((name, counts), _Group())
    start = dense_value(records)
    for label, goals in by_label(as_given(records)).items():
        whole = f"{title}: {label}"
        group.lines[whole] = lines[label]
        means = {goal: mean_and_deviation(metric_values(seeds, name)) for goal, seeds in goals.items()}
        group.cells[whole] = {goal: None if mean is None else mean[0] for goal, mean in means.items()}
        if start is not None:
            group.dense[whole] = start
    return True


def _section(place: int, metric: str, counts: str, group: _Group, alone: bool) -> Section:
    factor = 100.0 if is_share(metric) else 1.0
    distinct = sorted(set(group.dense.values()))
    dense = {"dense": distinct[0]} if len(distinct) == 1 and len(group.dense) > 1 else _once(group.dense)
    plot = accuracy_plot(f"o{place}-accuracy", group.lines, dense, metric, counts, factor)
    goals = sorted({goal for cells in group.cells.values() for goal in cells})
    header = ["", "dense", *(percent(goal) for goal in goals)]
    rows: list[list[Cell]] = [
        [label, metric_text(metric, group.dense.get(label)), *(_cell(metric, cells.get(goal)) for goal in goals)]
        for label, cells in group.cells.items()
    ]
    title = f"{'Accuracy' if factor == 100 and alone else metric} over {counts}"
    parts: list[Part] = [Pictures([Picture(plot)]), Table(header, rows, title=f"{metric} by goal")]
    return Section(title, parts)


def _once(dense: dict[str, float]) -> dict[str, float]:
    """Each value once, for the first that has it."""
    found: dict[float, str] = {}
    for label, value in dense.items():
        found.setdefault(value, label)
    return {label: value for value, label in found.items()}


def _cell(metric: str, value: float | None) -> str:
    return NOTHING if value is None else metric_text(metric, value)
