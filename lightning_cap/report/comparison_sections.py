"""The sections of a page that tell of a comparison of pruners."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightning_cap.comparison.records import RESULTS, SURFACE, ComparisonRecord
from lightning_cap.report.comparison import by_goal, labelled_by_setting
from lightning_cap.report.curves import deviation_note, near_range, plot_grid
from lightning_cap.report.figures import FISHER_BLOCK, read_fisher_block
from lightning_cap.report.files import FileLinks
from lightning_cap.report.heatmaps import plot_fisher_block, plot_surface
from lightning_cap.report.layer_names import short_names, spread
from lightning_cap.report.mask_plots import mask_agreement, plot_agreement, seed_note
from lightning_cap.report.parts import Cell, Chapter, Facts, Note, Part, Picture, Pictures, Section, Table
from lightning_cap.report.records import (
    Records,
    accuracy_name,
    as_given,
    by_label,
    counted,
    first_seed,
    goals_of,
    grid_settings,
    mean_and_deviation,
    metric_values,
    percent,
    unpruned_record,
)
from lightning_cap.report.run_folder import Comparison
from lightning_cap.report.run_plots import Points, accuracy_plot, layers_plot, loss_plot
from lightning_cap.report.style import styles
from lightning_cap.report.svg import inline_svg
from lightning_cap.report.texts import NOTHING, duration, is_share

_MOST_GOALS = 4


def comparison_chapter(comparison: Comparison, title: str, key: str, links: FileLinks) -> Chapter:
    """All about a comparison.

    Args:
        comparison: Its records.
        title: Its name on the page.
        key: Start of the names of its plots, of this comparison alone.
        links: From the page.
    """
    records = comparison.records
    labels = list(by_label(as_given(records)))
    seeds = len({record.seed for record in as_given(records)})
    goals = ", ".join(f"{100 * goal:.4g}" for goal in goals_of(records))
    lead = f"{len(labels)} pruner{'s' * (len(labels) != 1)} in one shot at {goals} % {counted(records)}"
    lead += f", means over {seeds} seeds." if seeds > 1 else "."
    if not labels:
        return Chapter(title, "No pruner has been run yet.", "", [_files(comparison, links)])
    sections = [
        _summary(comparison),
        _accuracy(records, key),
        _losses(records, key),
        _layers(records, key),
        _masks(comparison, key),
        *_grids(records, key),
        _planes(comparison, key),
        _seconds(records),
        _settings(records),
        _files(comparison, links),
    ]
    return Chapter(title, lead, "", [section for section in sections if section.parts])


def comparison_lines(records: Records) -> dict[str, Points]:
    """Share reached, mean metric and its deviation over seeds, by label."""
    name = accuracy_name(records)
    return {
        label: [
            (statistics.fmean(record.reached for record in seeds), *value)
            for seeds in goals.values()
            if (value := mean_and_deviation(metric_values(seeds, name))) is not None and math.isfinite(value[0])
        ]
        for label, goals in by_label(as_given(records)).items()
    }


def dense_value(records: Records) -> float | None:
    """The metric of the model before pruning."""
    unpruned, name = unpruned_record(records), accuracy_name(records)
    return None if unpruned is None or name is None else unpruned.metrics.get(name)


def _table(lines: list[list[str]], title: str = "", folded: bool = False) -> Table:
    rows = [[NOTHING if cell == "-" else cell for cell in line] for line in lines[1:]]
    return Table(lines[0], rows, title=title, folded=folded)


def _mean(value: tuple[float, float] | None, style: str, factor: float = 1.0) -> str:
    if value is None:
        return NOTHING
    return f"{factor * value[0]:{style}}" + (f" ± {factor * value[1]:{style}}" if value[1] else "")


def _summary(comparison: Comparison) -> Section:
    records = comparison.records
    name = accuracy_name(records)
    factor, style = (100.0, ".2f") if name and is_share(name) else (1.0, ".4g")
    lines = by_goal(
        records, as_given(records), lambda seeds: _mean(mean_and_deviation(metric_values(seeds, name)), style, factor)
    )
    title = f"{name or 'no metric'}{' (%)' if factor == 100 else ''} at each {counted(records)}"
    return Section("Summary", [_table(lines, title), *(Note(note) for note in comparison.notes)])


def _accuracy(records: Records, key: str) -> Section:
    """All values, and those near the model before pruning where some are far."""
    name, lines, start = accuracy_name(records), comparison_lines(records), dense_value(records)
    title = f"Metric over {counted(records)}"
    if name is None or not any(lines.values()):
        return Section(title, [Note("The module logs no metric in validation.")])
    factor = 100.0 if is_share(name) else 1.0
    unpruned = unpruned_record(records)
    dense = {} if start is None or unpruned is None else {unpruned.label: start}
    known = {label: points for label, points in lines.items() if points}
    near = None if start is None else near_range(start, [[(p[1], p[2]) for p in points] for points in known.values()])
    whole = accuracy_plot(f"{key}accuracy", known, dense, name, counted(records), factor)
    pictures = [Picture(whole, "All values." if near is not None else deviation_note(records))]
    if near is not None:
        plot = accuracy_plot(f"{key}near", known, dense, name, counted(records), factor, near)
        note = deviation_note(records)
        pictures.append(Picture(plot, f"The same, near the model before pruning{f'; {note}' if note else ''}."))
    return Section(f"{'Accuracy' if factor == 100 else name} over {counted(records)}", [Pictures(pictures)])


def _losses(records: Records, key: str) -> Section:
    """Measured over predicted increase of the loss: geometric means over the seeds."""
    given = as_given(records)
    predicting = [record for record in given if record.predicted_loss is not None]
    title = "Predicted and measured loss"
    if not predicting:
        return Section(title, [Note("No pruner predicts the loss.")])
    kind = "calibration" if any(r.loss_increase.get("calibration") is not None for r in predicting) else "validation"
    points: dict[str, list[tuple[float, float, float]]] = {}
    for label, goals in by_label(predicting).items():
        for goal, seeds in goals.items():
            pairs = [(record.predicted_loss, record.loss_increase.get(kind)) for record in seeds]
            known = [
                (p, m) for p, m in pairs if p is not None and m is not None and 0 < p < math.inf and 0 < m < math.inf
            ]
            if known:
                means = [statistics.geometric_mean(values) for values in zip(*known, strict=True)]
                points.setdefault(label, []).append((means[0], means[1], goal))
    parts: list[Part] = []
    if points:
        plot = loss_plot(f"{key}loss", points, f"{kind} data", styles(list(by_label(given))))
        several = len({record.seed for record in given}) > 1
        parts.append(Pictures([Picture(plot, "Geometric means over the seeds." if several else "")]))
    parts += [
        _losses_table(records, "Predicted increase", lambda record: record.predicted_loss),
        _losses_table(
            records, "Measured on calibration samples", lambda record: record.loss_increase.get("calibration")
        ),
        _losses_table(records, "Measured on validation data", lambda record: record.loss_increase.get("validation")),
    ]
    return Section(title, parts)


def _losses_table(records: Records, title: str, value: Callable[[ComparisonRecord], float | None]) -> Table:
    lines = by_goal(
        records,
        as_given(records),
        lambda seeds: _mean(mean_and_deviation([value(record) for record in seeds]), ".3g"),
        with_unpruned=False,
    )
    return _table(lines, title, folded=True)


def _layers(records: Records, key: str) -> Section:
    """The sparsity of each layer, a plot for each of some goals."""
    found = by_label(first_seed(as_given(records)))
    pictures = []
    for place, goal in enumerate(spread(goals_of(records), _MOST_GOALS)):
        having = {label: goals[goal][0].sparsities for label, goals in found.items() if goal in goals}
        names = list(next(iter(having.values()), {}))
        if names:
            values = {label: [100 * own.get(name, 0.0) for name in names] for label, own in having.items()}
            plot = layers_plot(
                f"{key}layers{place}", short_names(names), values, "sparsity (%)", looks=styles(list(found))
            )
            pictures.append(Picture(plot, f"Model at {percent(goal)} {counted(records)}."))
    note = seed_note(records)
    return Section(
        "Layers", [Pictures(pictures), *([Note(f"{note[0].upper()}{note[1:]}.")] if note else [])] if pictures else []
    )


def _masks(comparison: Comparison, key: str) -> Section:
    """How far the masks of two pruners agree."""
    records, folder, title = comparison.records, comparison.folder, "Agreement of masks"
    if len(by_label(as_given(records))) < 2:
        return Section(title, [])
    gone = [
        record.masks
        for record in first_seed(as_given(records))
        if record.masks and not (folder / record.masks).is_file()
    ]
    if gone:
        return Section(title, [Note(f"Not shown: {len(gone)} files of masks are no longer there, such as {gone[0]}.")])
    agreement = mask_agreement(records, folder)
    if not agreement:
        return Section(title, [])
    plot = inline_svg(
        lambda path: plot_agreement(agreement, path, seed_note(records), counted(records)),
        f"{key}masks", "Agreement of the masks of every two pruners", on_image=True,
    )  # fmt: skip
    return Section(title, [Picture(plot, wide=True)])


def _grids(records: Records, key: str) -> list[Section]:
    """Accuracy over the values of a setting."""
    name = accuracy_name(records)

    def cell(seeds: Records) -> str:
        return _mean(mean_and_deviation(metric_values(seeds, name)), ".4f")

    found = []
    for place, setting in enumerate(grid_settings(records)):
        plot = inline_svg(partial(plot_grid, records, setting), f"{key}grid{place}", f"Accuracy over {setting}")
        lines = by_goal(records, labelled_by_setting(records, setting), cell)
        found.append(Section(f"Grid over {setting}", [Picture(plot, wide=True), _table(lines, "Values", folded=True)]))
    return found


def _planes(comparison: Comparison, key: str) -> Section:
    """The loss surface and the average Fisher block."""
    records, parts = comparison.records, []
    surface = comparison.surface
    if surface is not None:
        looks = styles(list(by_label(as_given(records))))
        plot = inline_svg(
            lambda path: plot_surface(surface, path, looks, counted(records)),
            f"{key}surface", "Loss in the plane of two pruned models", on_image=True,
        )  # fmt: skip
        parts.append(
            Picture(plot, f"{surface.pruners[0]} and {surface.pruners[1]}: the loss in the plane of both.", wide=True)
        )
    of, blocks = read_fisher_block(comparison.folder / FISHER_BLOCK)
    if of in {record.fingerprint for record in records}:
        draw = partial(plot_fisher_block, blocks)
        parts.append(Picture(inline_svg(draw, f"{key}fisher", "Average block of the Fisher", on_image=True), wide=True))
    return Section("Loss surface and Fisher", parts)


def _seconds(records: Records) -> Section:
    phases = list(dict.fromkeys(phase for record in as_given(records) for phase in record.seconds))
    rows: list[list[Cell]] = []
    for label, goals in by_label(as_given(records)).items():
        every = [record for seeds in goals.values() for record in seeds]
        means = (mean_and_deviation([record.seconds.get(phase) for record in every]) for phase in phases)
        rows.append([label, *(duration(None if mean is None else mean[0]) for mean in means)])
    table = Table(["pruner", *phases], rows, title="Mean of a result")
    return Section("Time", [table, Note("Collecting counts as if each pruner did so by itself.")] if phases else [])


def _settings(records: Records) -> Section:
    given = {record.label: record for record in reversed(as_given(records))}
    entries: list[tuple[str, Cell]] = []
    for label, record in reversed(given.items()):
        steps = record.parameters.get("num_recomputations", 1)
        entries.append((label, record.settings if steps == 1 else f"{record.settings}, {steps} steps"))
    return Section("Settings", [Facts(entries, wide=True)])


def _files(comparison: Comparison, links: FileLinks) -> Section:
    folder = comparison.folder
    paths = [
        folder / RESULTS,
        folder / "results.md",
        folder / SURFACE,
        folder / FISHER_BLOCK,
        *sorted(folder.glob("*.png")),
    ]
    paths += [folder / record.weights for record in comparison.records if record.weights]
    masks = [folder / record.masks for record in comparison.records if record.masks]
    paths += [Path(folder / "masks")] if masks else []
    there = [path for path in dict.fromkeys(paths) if path.exists()]
    return Section("Files", [Table(["file", "size"], [[links.to(path), links.size(path)] for path in there])])
