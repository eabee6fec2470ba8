"""The sections of a page that tell of a run: what it gave, over epochs, and layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_cap.report.files import FileLinks
from lightning_cap.report.layer_names import short_names, spread
from lightning_cap.report.parts import (
    Cell,
    Chapter,
    Link,
    Note,
    Part,
    Picture,
    Pictures,
    Section,
    Table,
    Tile,
    Tiles,
)
from lightning_cap.report.records import percent
from lightning_cap.report.run_costs import cost_section, loss_section, settings_sections
from lightning_cap.report.run_folder import Run
from lightning_cap.report.run_numbers import RunNumbers
from lightning_cap.report.run_plots import Points, accuracy_plot, drop_plot, layers_plot, metric_plot, schedule_plot
from lightning_cap.report.texts import NOTHING, change_text, change_unit, count, metric_text, number, share
from lightning_cap.trainer.run_records import CycleRecord

_STATES = {"running": "running, or killed", "": "state unknown"}
_MOST_TILES = 7
_MOST_GOALS = 5


def run_chapter(run: Run, title: str, key: str, links: FileLinks) -> Chapter:
    """All about a run.

    Args:
        run: Its records.
        title: Its name on the page.
        key: Start of the names of its plots, of this run alone.
        links: From the page.
    """
    numbers = RunNumbers(run)
    sections = [
        _summary(numbers, links),
        _over_epochs(numbers, key),
        _over_sparsity(numbers, key),
        _layers(numbers, key),
        loss_section(numbers, key),
        cost_section(numbers, key),
        *settings_sections(numbers, links),
    ]
    state = run.start.state if run.start is not None else ""
    return Chapter(title, _lead(run), _STATES.get(state, state), [section for section in sections if section.parts])


def _lead(run: Run) -> str:
    """What the run is, in a sentence."""
    start = run.start
    last = run.events[-1].epoch if run.events else -1
    planned = {} if start is None else start.schedule  # of events that have come, what they went for counts
    goals = sorted({e.goal for e in run.events} | {goal for epoch, goal in planned.items() if int(epoch) > last})
    reached = f" to {_listed([f'{100 * goal:.4g}' for goal in goals])} % {run.counted}" if 0 < len(goals) <= 8 else ""
    if start is None:
        return f"Pruning{reached}, as its events tell; there is no run.jsonl."
    by = f" by {start.settings['pruner']}" if "pruner" in start.settings else ""
    how = "One-shot" if len(start.schedule) == 1 else "Gradual"
    epochs = f", {start.max_epochs} epochs" if start.max_epochs > 0 else ""
    return f"{how} pruning of {start.model} ({count(start.weights)} weights){by}{reached}{epochs}."


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _summary(numbers: RunNumbers, links: FileLinks) -> Section:
    """The first numbers, and a line for each model that there is."""
    run, metric = numbers.run, numbers.metric or "metric"
    parts: list[Part] = []
    tiles = _tiles(numbers)
    if 1 < len(tiles) <= _MOST_TILES:
        parts.append(Tiles(tiles))
    costs = next((cycle.saving.cost for cycle in numbers.cycles if cycle.saving is not None), None)
    header = ["model", "epochs", metric, f"{numbers.change_name}{change_unit(metric)}"]
    header += [f"{costs} saved", "left, as predicted"] if costs not in (None, "flops") else []
    header += ["sparsity", "FLOPs saved", "size", "files"]
    rows: list[list[Cell]] = []
    if numbers.dense is not None:
        blank = [NOTHING] * (len(header) - 3)
        rows.append(["dense", NOTHING, metric_text(metric, numbers.dense), *blank])
    rows += [_model_row(numbers, cycle, metric, costs not in (None, "flops"), links) for cycle in numbers.cycles]
    if rows:
        parts.append(Table(header, rows))
    if not numbers.cycles:
        parts.append(Note(_no_cycles(numbers)))
    parts += _finetuned(numbers, links)
    parts += [Note(note) for note in run.notes]
    return Section("Summary", parts)


def _no_cycles(numbers: RunNumbers) -> str:
    if numbers.run.events:
        return "No cycle has ended yet: what each event leads to is told when training has gone on after it."
    schedule = numbers.run.start.schedule if numbers.run.start is not None else {}
    first = f" The first is due at epoch {next(iter(schedule))}." if schedule else ""
    return f"No pruning event has taken place yet.{first}"


def _tiles(numbers: RunNumbers) -> list[Tile]:
    metric = numbers.metric or ""
    tiles = [] if numbers.dense is None else [Tile("dense", metric_text(metric, numbers.dense), [metric])]
    for cycle in numbers.cycles:
        if cycle.best and any(other.goal == cycle.goal and not other.best for other in numbers.cycles):
            continue
        drop, saved = numbers.drop(cycle.value), numbers.saved_by(cycle)
        unit = " points" if numbers.factor == 100 else ""
        told = [] if drop is None else [f"{change_text(metric, -numbers.sign * drop)}{unit}"]
        told += [] if saved is None else [f"{share(saved, 1)} of FLOPs saved"]
        tiles.append(Tile(_goal(numbers, cycle.goal), metric_text(metric, cycle.value), told))
    return tiles


def _goal(numbers: RunNumbers, goal: float) -> str:
    counted = numbers.run.counted
    return f"{percent(goal)} {'sparse' if counted == 'sparsity' else f'of {counted} saved'}"


def _model_row(numbers: RunNumbers, cycle: CycleRecord, metric: str, with_saving: bool, links: FileLinks) -> list[Cell]:
    """The line of a cycle's end or best epoch."""
    run = numbers.run
    name = f"{percent(cycle.goal)}{', best epoch' if cycle.best else ''}"
    row: list[Cell] = [name, f"{cycle.epochs}", metric_text(metric, cycle.value)]
    row.append(change_text(metric, numbers.drop(cycle.value)))
    if with_saving:
        row += [NOTHING, NOTHING] if cycle.saving is None else [share(cycle.saving.share), cycle.saving.left]
    weights = run.file(cycle.weights) if cycle.weights else None
    files: list[Link] = [] if weights is None else [links.to(weights, ".safetensors")]
    files += [links.to(run.file(cycle.checkpoint), ".ckpt")] if cycle.checkpoint else []
    row += [share(cycle.sparsity), share(numbers.saved_by(cycle)), NOTHING if weights is None else links.size(weights)]
    return [*row, files or NOTHING]


def _finetuned(numbers: RunNumbers, links: FileLinks) -> list[Part]:
    """A line for each checkpoint that was trained on: the paper's Table 3."""
    run = numbers.run
    if not run.finetuned:
        return []
    metric = run.finetuned[0].metric
    header = [
        "goal",
        "sparsity",
        "FLOPs saved",
        f"{metric} before",
        "after",
        f"gain{change_unit(metric)}",
        "epochs",
        "size",
        "files",
    ]
    rows: list[list[Cell]] = []
    for record in run.finetuned:
        gain = None if record.before is None or record.after is None else numbers.sign * (record.after - record.before)
        files = [links.to(run.file(path), Path(path).suffix) for path in (record.weights, record.checkpoint) if path]
        size = links.size(run.file(record.weights)) if record.weights else NOTHING
        rows.append(
            [
                percent(record.goal), share(record.sparsity), share(record.flops_saved), metric_text(metric, record.before),
                metric_text(metric, record.after), change_text(metric, gain), f"{record.epochs}", size, files or NOTHING,
            ]
        )  # fmt: skip
    return [Table(header, rows, title="After fine-tuning")]


def _over_epochs(numbers: RunNumbers, key: str) -> Section:
    """Sparsity, learning rate, the metric, and the drop of each event: the paper's Figure 2."""
    run, metric = numbers.run, numbers.metric
    pictures: list[Picture] = []
    notes: list[Part] = []
    rates = run.metrics.learning_rates() if run.metrics is not None else {}
    if run.events:
        caption = "Each step of the sparsity is a pruning event" + (
            "; the learning rate restarts with it." if rates else "."
        )
        counted = "sparsity" if run.counted == "sparsity" else f"{run.counted} saved"
        pictures.append(Picture(schedule_plot(f"{key}schedule", numbers.sparsity_curve, rates, counted), caption))
    if run.metrics is None:
        notes.append(
            Note(
                "Learning rate and metrics over epochs are not shown: there is no metrics.csv. Train with CSVLogger to have them."
            )
        )
    elif not rates:
        notes.append(Note("No learning rate was logged: add LearningRateMonitor to the callbacks to see it here."))
    if numbers.relative_drops and metric:
        caption = "Value before the event minus that right after it, over the value before."
        pictures.append(Picture(drop_plot(f"{key}drop", numbers.relative_drops, metric), caption))
    curve = run.metrics.curve(metric) if run.metrics is not None and metric is not None else []
    if metric and len(curve) > 1:
        epochs = [event.epoch for event in run.events]
        pictures.append(
            Picture(
                metric_plot(f"{key}metric", curve, metric, epochs, numbers.dense, numbers.factor),
                "As logged in validation.",
            )
        )
    table = _events_table(numbers)
    return Section("Over epochs", [*([Pictures(pictures)] if pictures else []), *table, *notes])


def _events_table(numbers: RunNumbers) -> list[Part]:
    metric = numbers.metric or ""
    if not numbers.run.events:
        return []
    drops = {epoch: drop for epoch, _, drop in numbers.relative_drops}
    header = [
        "epoch",
        "goal",
        "sparsity",
        f"{metric} before",
        "after",
        f"relative {numbers.change_name}",
        "used",
        "left out",
        "grown back",
    ]
    rows = [
        [
            f"{event.epoch}", percent(event.goal), share(event.sparsity), metric_text(metric, event.before.get(metric)),
            metric_text(metric, event.after.get(metric)), share(drops.get(event.epoch)), f"{event.samples} {event.unit}",
            f"{event.skipped}", f"{event.grown_back}",
        ]
        for event in numbers.run.events
    ]  # fmt: skip
    return [Table(header, rows, title=f"All {len(rows)} events" if len(rows) > 1 else "The event", folded=True)]


def accuracy_lines(numbers: RunNumbers) -> dict[str, Points]:
    """Sparsity and metric of a run's models: cycles' ends, their best epochs, and after fine-tuning."""
    kinds = {
        "end of cycle": [cycle for cycle in numbers.cycles if not cycle.best],
        "best epoch of cycle": [cycle for cycle in numbers.cycles if cycle.best],
    }
    lines: dict[str, Points] = {
        name: [
            (cycle.sparsity if cycle.saving is None else cycle.saving.share, cycle.value, 0.0)
            for cycle in cycles
            if cycle.value is not None
        ]
        for name, cycles in kinds.items()
    }
    lines["fine-tuned"] = [
        (record.goal if numbers.run.counted != "sparsity" else record.sparsity, record.after, 0.0)
        for record in numbers.run.finetuned
        if record.after is not None
    ]
    return {name: points for name, points in lines.items() if points}


def _over_sparsity(numbers: RunNumbers, key: str) -> Section:
    """The metric of all models, with that right after events."""
    metric, counted = numbers.metric, numbers.run.counted
    lines = accuracy_lines(numbers)
    if metric is None or not lines:
        return Section("Accuracy over sparsity", [])
    after = [
        (event.sparsity if event.saving is None else event.saving.share, event.after[metric], 0.0)
        for event in numbers.run.events
        if metric in event.after
    ]
    lines |= {"right after the event": after} if after else {}
    dense = {} if numbers.dense is None else {"dense": numbers.dense}
    what = "sparsity" if counted == "sparsity" else f"{counted} saved"
    picture = Picture(accuracy_plot(f"{key}accuracy", lines, dense, metric, what, numbers.factor))
    return Section(f"{'Accuracy' if numbers.factor == 100 else metric} over {what}", [Pictures([picture])])


def _layers(numbers: RunNumbers, key: str) -> Section:
    """Sparsity and FLOPs of each layer, at some of the goals."""
    events = {event.goal: event for event in numbers.run.events if event.sparsities}
    if not events:
        return Section("Layers", [])
    goals = spread(sorted(events), _MOST_GOALS)
    targets = [layer for layer in numbers.layers if layer.name in events[goals[-1]].sparsities]
    names = short_names([layer.name for layer in targets])
    values = {
        percent(goal): [100 * events[goal].sparsities.get(layer.name, 0.0) for layer in targets] for goal in goals
    }
    pictures = [Picture(layers_plot(f"{key}layers", names, values, "sparsity (%)"), "By the goals of the run.")]
    parts: list[Part] = []
    if numbers.flops and all(layer.flops is not None for layer in numbers.layers):
        every = list(numbers.layers)
        million = [(layer.flops or 0) / 1e6 for layer in every]
        effective: dict[str, list[float | None]] = {
            percent(goal): [
                flops * (1 - events[goal].sparsities[layer.name]) if layer.name in events[goal].sparsities else None
                for layer, flops in zip(every, million, strict=True)
            ]
            for goal in goals
        }
        plot = layers_plot(
            f"{key}flops",
            short_names([layer.name for layer in every]),
            effective,
            "million FLOPs on one example",
            million,
        )
        pictures.append(Picture(plot, "Bars: all; markers: without those of zeros."))
    else:
        parts.append(Note("FLOPs of layers are not shown: they were not counted when the run began."))
    return Section("Layers", [Pictures(pictures), _layers_table(numbers, goals), *parts])


def _layers_table(numbers: RunNumbers, goals: Sequence[float]) -> Table:
    """All layers, also those left dense."""
    events = {event.goal: event for event in numbers.run.events}
    header = [
        "layer",
        "shape",
        "left dense",
        *(f"zeros at {percent(goal)}" for goal in goals),
        "FLOPs",
        "without zeros'",
    ]
    rows: list[list[Cell]] = []
    for layer in numbers.layers:
        found = [events[goal].sparsities.get(layer.name) for goal in goals]
        left = None if layer.flops is None else layer.flops * (1 - (found[-1] or 0.0))
        shape = " × ".join(map(str, layer.shape)) or NOTHING
        rows.append([layer.name, shape, layer.dense or NOTHING, *map(share, found), count(layer.flops), count(left)])
    if numbers.flops is not None:
        saved = [numbers.flops_saved(events[goal].sparsities) for goal in goals]
        whole = number(None) if saved[-1] is None else count(numbers.flops * (1 - saved[-1]))
        told = [f"{share(value, 1)} saved" if value is not None else NOTHING for value in saved]
        rows.append(["FLOPs of the whole model", "", "", *told, count(numbers.flops), whole])
    return Table(header, rows, title=f"All {len(numbers.layers)} layers", words=3, folded=True)
