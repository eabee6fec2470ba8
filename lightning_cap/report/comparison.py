"""The tables of a comparison: on the console, and as Markdown with everything that it was made with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_cap.report.figures import draw_all
from lightning_cap.report.rows import (
    Row,
    accuracy_name,
    by_label,
    dense_row,
    mean_and_deviation,
    metric_values,
    number_first,
    percent,
    plain_rows,
    targets_of,
)
from lightning_cap.utilities.files import atomic

_Cell = Callable[[Sequence[Row]], str]


def report(rows: Sequence[Row], folder: Path) -> list[str]:
    """Write ``results.md`` and the pictures of a comparison into the folder that has its ``results.json``.

    Args:
        rows: What `lightning_cap.comparison.compare` returned.
        folder: Its folder.

    Returns:
        The names of the files.
    """
    with atomic(folder / "results.md") as path:
        path.write_text(markdown(rows))
    return ["results.md", *draw_all(rows, folder)]


def print_comparison(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print mean accuracies, a line for each pruner; with a single pruner, all metrics, a line for each sparsity.

    Args:
        rows: What `lightning_cap.comparison.compare` returned.
        console: Where to. Default: standard output.
    """
    labels = by_label(rows)
    table = (
        _one_pruner(rows)
        if len(labels) == 1
        else Table(title=f"{accuracy_name(rows) or 'no metric'} at each sparsity", padding=(0, 0))
    )
    if len(labels) > 1:
        table.add_column("pruner", overflow="fold")
        header, *lines = _by_sparsity(rows, rows, _mean(rows))
        for name in header[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        for line in lines:
            table.add_row(*line)
    (console or Console()).print(table)


def _one_pruner(rows: Sequence[Row]) -> Table:
    metrics = list(rows[0]["metrics"])
    (label, targets), dense = next(iter(by_label(rows).items())), dense_row(rows)
    table = Table(title=f"One-shot pruning by {label}")
    for name in ("sparsity", "predicted loss", *metrics):
        table.add_column(name, justify="right")
    for target, seeds in {**({0.0: [dense]} if dense else {}), **targets}.items():
        name = "dense" if target == 0 else f"{seeds[0]['sparsity']:.4f}"
        predicted = _number(mean_and_deviation([row["predicted_loss"] for row in seeds]), ".4g")
        table.add_row(name, predicted, *(_number(mean_and_deviation(metric_values(seeds, m))) for m in metrics))
    return table


def markdown(rows: Sequence[Row]) -> str:
    """All results as Markdown: accuracies, losses, seconds, grids, and the settings of every pruner.

    Args:
        rows: What `lightning_cap.comparison.compare` returned.
    """
    plain, name = plain_rows(rows), accuracy_name(rows)
    seeds = sorted({row["seed"] for row in plain})
    dense = dense_row(rows)
    parts = [
        "# Comparison of pruners",
        f"Mean ± standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))})."
        if len(seeds) > 1
        else f"Seed {seeds[0]}.",
        f"## {name or 'Metric'}",
        "" if dense is None else f"Dense: {_number(mean_and_deviation(metric_values([dense], name)))}.",
        _table(_by_sparsity(rows, plain, _accuracy(rows))),
        "## Increase of the loss",
        "Predicted by the pruner (in its own unit, where it has no model of the loss):",
        _table(_by_sparsity(rows, plain, _predicted, with_dense=False)),
        "Measured on calibration samples:",
        _table(_by_sparsity(rows, plain, _increase("calibration"), with_dense=False)),
        "Measured on the validation data:",
        _table(_by_sparsity(rows, plain, _increase("validation"), with_dense=False)),
        "## Seconds",
        "To collect gradients (as if each pruner did so by itself) and to solve, then to read one sparsity.",
        _table(_by_sparsity(rows, plain, _seconds, with_dense=False)),
    ]
    for setting in dict.fromkeys(row["grid"]["setting"] for row in rows if row["grid"] is not None):
        grid = [row for row in rows if row["grid"] is not None and row["grid"]["setting"] == setting]
        parts += [
            f"## Grid over `{setting}`",
            _table(_by_sparsity(rows, _labelled(plain, grid, setting), _accuracy(rows))),
        ]
    settings = {row["label"]: row["settings"] for row in reversed(plain)}
    steps = {row["label"]: row["parameters"]["num_recomputations"] for row in plain}
    parts += ["## Settings", "\n".join(f"- {label}: `{settings[label]}`, {steps[label]} step(s)" for label in steps)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _labelled(plain: Sequence[Row], grid: Sequence[Row], setting: str) -> list[Row]:
    """The rows of a grid and of its pruners as given, each with its value in the label, in order."""
    names = list(dict.fromkeys(row["pruner"] for row in grid))
    every = [row for row in plain if row["pruner"] in names] + list(grid)
    every.sort(key=lambda row: (names.index(row["pruner"]), number_first(row["parameters"][setting])))
    return [{**row, "label": f"{row['pruner']} {setting}={row['parameters'][setting]}"} for row in every]


def _by_sparsity(rows: Sequence[Row], chosen: Sequence[Row], cell: _Cell, with_dense: bool = True) -> list[list[str]]:
    """Header and lines: a line for each label, a column for each sparsity."""
    targets, dense = targets_of(rows), dense_row(rows)
    lines = [["pruner", *(percent(target) for target in targets)]]
    for label, found in by_label(chosen).items():
        lines.append([label, *(cell(found[target]) if target in found else "-" for target in targets)])
    if with_dense and dense is not None:
        lines[0].insert(1, "dense")
        for line in lines[1:]:
            line.insert(1, cell([dense]))
    return lines


def _accuracy(rows: Sequence[Row]) -> _Cell:
    name = accuracy_name(rows)
    return lambda seeds: _number(mean_and_deviation(metric_values(seeds, name)))


def _mean(rows: Sequence[Row]) -> _Cell:
    """Short, for the console."""
    name = accuracy_name(rows)
    return lambda seeds: "-" if (v := mean_and_deviation(metric_values(seeds, name))) is None else f"{v[0]:.4f}"


def _predicted(seeds: Sequence[Row]) -> str:
    return _number(mean_and_deviation([row["predicted_loss"] for row in seeds]), ".3g")


def _increase(kind: str) -> _Cell:
    return lambda seeds: _number(mean_and_deviation([row["loss_increase"][kind] for row in seeds]), ".3g")


def _seconds(seeds: Sequence[Row]) -> str:
    columns = ([row["seconds"][phase] for row in seeds] for phase in ("collect", "solve", "apply"))
    found = [mean_and_deviation(values) for values in columns]
    return " / ".join("-" if value is None else f"{value[0]:.3g}" for value in found)


def _number(value: tuple[float, float] | None, style: str = ".4f") -> str:
    if value is None:
        return "-"
    return f"{value[0]:{style}}" + (f" ± {value[1]:{style if style == '.4f' else '.1g'}}" if value[1] else "")


def _table(lines: Iterable[Sequence[str]]) -> str:
    header, *body = lines
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body))
