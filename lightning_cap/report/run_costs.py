"""The sections of a page that tell what the events of a run cost, whether they did what was predicted, and its settings."""

from __future__ import annotations

from pathlib import Path

from lightning_cap.report.files import FileLinks
from lightning_cap.report.parts import Cell, Facts, Link, Note, Part, Picture, Pictures, Section, Source, Table
from lightning_cap.report.records import percent
from lightning_cap.report.run_folder import Run
from lightning_cap.report.run_numbers import RunNumbers
from lightning_cap.report.run_plots import bars_plot, loss_plot
from lightning_cap.report.texts import NOTHING, count, duration, number, share, size
from lightning_cap.trainer.run_records import PlanRecord

_MOST_BARS = 40  # events


def loss_section(numbers: RunNumbers, key: str) -> Section:
    """Predicted against measured increase of the loss."""
    title, found = "Predicted and measured loss", numbers.losses
    if not found:
        return Section(title, [])
    parts: list[Part] = []
    known = [loss for loss in found if loss.predicted is not None and loss.measured is not None]
    points = [
        (loss.predicted, loss.measured, loss.event.goal)
        for loss in known
        if loss.predicted is not None and loss.measured is not None and loss.predicted > 0 and loss.measured > 0
    ]
    if points:
        caption = "Each event; numbers are goals in per cent."
        parts.append(Pictures([Picture(loss_plot(f"{key}loss", {"events": points}, numbers.loss_name or ""), caption)]))
    if all(loss.predicted is None for loss in found):
        parts.append(Note("The pruner predicts no loss."))
    if numbers.loss_name is None:
        parts.append(
            Note("No loss was measured right before and after events: log one in validation, and leave evaluate on.")
        )
    left_out = len(known) - len(points)
    if left_out:
        parts.append(
            Note(
                f"{left_out} of {len(known)} events have no increase above zero, which a logarithmic axis cannot show."
            )
        )
    header = ["epoch", "goal", "predicted increase", "measured increase", "measured over predicted"]
    rows = []
    for loss in found:
        ratio = loss.measured / loss.predicted if loss.predicted and loss.measured is not None else None
        rows.append(
            [
                f"{loss.event.epoch}",
                percent(loss.event.goal),
                number(loss.predicted),
                number(loss.measured),
                number(ratio, ".3g"),
            ]
        )
    parts.append(
        Table(header, rows, title=f"By {numbers.loss_name}" if numbers.loss_name else "By event", folded=len(rows) > 8)
    )
    return Section(title, parts)


def cost_section(numbers: RunNumbers, key: str) -> Section:
    """Seconds and bytes of the events, beside what was planned."""
    events = numbers.run.events
    title = "Time and memory of events"
    start = numbers.run.start
    plan = None if start is None else start.plan
    if not events:
        return Section(title, [] if plan is None else [_plan(plan)])
    phases = list(dict.fromkeys(phase for event in events for phase in event.seconds))
    shown = events if len(events) <= _MOST_BARS else events[-_MOST_BARS:]
    places = [f"{percent(event.goal)}, epoch {event.epoch}" for event in shown]
    pictures = []
    if phases:
        seconds = {phase: [event.seconds.get(phase, 0.0) for event in shown] for phase in phases}
        pictures.append(
            Picture(bars_plot(f"{key}time", places, seconds, "seconds", stacked=True), "By phase of the event.")
        )
    unit, name = (1e9, "GB") if max(event.peak_bytes for event in events) >= 1e9 else (1e6, "MB")
    memory = {"planned": [event.peak_bytes / unit for event in shown]}
    if any(event.measured_bytes is not None for event in shown):
        memory["measured"] = [(event.measured_bytes or 0) / unit for event in shown]
    if any(memory["planned"]):
        caption = "Peak memory that an event takes besides training, on the device of the weights."
        pictures.append(Picture(bars_plot(f"{key}memory", places, memory, f"peak {name}", stacked=False), caption))
    parts: list[Part] = [Pictures(pictures)]
    if len(shown) < len(events):
        parts.append(Note(f"The last {len(shown)} of {len(events)} events are drawn; the table has all."))
    if "measured" not in memory:
        parts.append(Note("Memory was not measured: the device of the weights does not tell it."))
    header = ["epoch", "goal", *phases, "in all", "memory planned", "memory measured"]
    rows = [
        [
            f"{event.epoch}",
            percent(event.goal),
            *(duration(event.seconds.get(phase)) for phase in phases),
            duration(sum(event.seconds.values())),
            size(event.peak_bytes),
            size(event.measured_bytes),
        ]
        for event in events
    ]
    parts.append(Table(header, rows, title="By event", folded=len(rows) > 8))
    return Section(title, [*parts, *([] if plan is None else [_plan(plan)])])


def _plan(plan: PlanRecord) -> Facts:
    """The memory plan, in words."""
    entries: list[tuple[str, Cell]] = [
        ("device", plan.device),
        ("peak memory planned", size(plan.peak_bytes)),
        ("limit", size(plan.limit)),
        ("Fisher kept on", plan.storage_device),
        ("main memory", size(plan.host_bytes)),
        ("passes over the gradients", f"{plan.passes}"),
        ("blocks solved at a time", f"{plan.chunk}"),
        ("gradient rows at once", "as many as fit" if plan.rows is None else f"{plan.rows}"),
    ]
    return Facts(entries, title="The plan of the events")


def settings_sections(numbers: RunNumbers, links: FileLinks) -> list[Section]:
    """Files for other runtimes, settings, environment, and links to everything."""
    run = numbers.run
    start = run.start
    settings: list[Part] = []
    environment: list[Part] = []
    if start is not None:
        settings += [Facts(list(start.settings.items()))] if start.settings else []
        environment += [Facts(list(start.environment.items()))] if start.environment else []
    settings += [Source(path.name, text) for path, text in run.settings.items()]
    return [
        _exports(run, links),
        Section("Settings", settings),
        Section("Environment", [*environment, *_starts(run)]),
        _files(run, links),
    ]


def _starts(run: Run) -> list[Part]:
    """All starts of a run that was resumed, else when it began and ended."""
    if not run.starts:
        return []
    rows = [
        [_moment(start.started), _moment(start.ended) or NOTHING, start.state, f"{start.epoch}", f"{start.max_epochs}"]
        for start in run.starts
    ]
    return [Table(["started (UTC)", "ended", "state", "from epoch", "to epoch"], rows, words=3)]


def _moment(text: str) -> str:
    """A time in ISO 8601, to the second."""
    return text[:19].replace("T", " ")


def _exports(run: Run, links: FileLinks) -> Section:
    """Files for other runtimes, and how fast they are."""
    title = "Exported files"
    own = [(path, record) for path, record in run.exports if path.parent != run.folder]
    if not own and not run.benchmarks:
        return Section(title, [])
    header = ["file", "format", "size", "of dense", "sparsity", "largest difference", "zeros kept"]
    rows: list[list[Cell]] = []
    for path, record in own:
        of_dense = share(record.bytes / record.dense_bytes, 1) if record.dense_bytes else NOTHING
        difference = "not run" if record.difference is None else f"{record.difference:.1e}"
        zeros = f"{record.zeros_equal} of {record.weights} weights" if record.weights else NOTHING
        rows.append(
            [links.to(path), record.format, size(record.bytes), of_dense, share(record.sparsity), difference, zeros]
        )
    parts: list[Part] = [Table(header, rows, words=2)] if rows else []
    if run.benchmarks:
        header = ["model", "batch", "time of a call", "times as fast", "quartiles", "FLOPs", "device"]
        lines = [
            [
                record.model, f"{record.batch_size}", f"{record.milliseconds:.3g} ms", f"{record.speedup:.2f}",
                f"{record.speedup_low:.2f} to {record.speedup_high:.2f}", count(record.flops),
                f"{record.device}, {record.threads} threads",
            ]
            for record in run.benchmarks
        ]  # fmt: skip
        parts.append(Table(header, lines, title="Measured speed"))
        parts += [Note(f"{r.model}, batch {r.batch_size}: {r.remark}") for r in run.benchmarks if r.remark]
    return Section(title, parts)


def _files(run: Run, links: FileLinks) -> Section:
    """Everything that belongs to the run and is there, or should be."""
    paths: list[Path] = []
    for cycle in run.cycles:
        paths += [run.file(name) for name in (cycle.weights, cycle.checkpoint) if name]
    for record in run.finetuned:
        paths += [run.file(name) for name in (record.weights, record.checkpoint) if name]
    paths += [path for path, _ in run.exports]
    names = ("run", "events", "cycles", "finetuned")
    paths += [path for name in names if (path := run.folder / f"{name}{run.suffix}.jsonl").exists()]
    paths += [path for path in (run.folder / "exports.jsonl", *run.settings) if path.exists()]
    for place in (run.folder, run.folder.parent if run.folder.name == "checkpoints" else run.folder):
        paths += [path for name in ("metrics.csv",) if (path := place / name).exists()]
    rows: list[list[Cell]] = []
    for path in dict.fromkeys(paths):
        link: Link = links.to(path)
        rows.append([link, links.size(path) if link.href else "no longer there"])
    return Section("Files", [Table(["file", "size"], rows)] if rows else [])
