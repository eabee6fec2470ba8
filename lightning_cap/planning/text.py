"""A plan, for people."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_cap.planning.run_plan import ChoicePlan, EpochPlan, PruningPlan, RunPlan, TimelinePlan
from lightning_cap.trainer.run_records import LayerRecord, PlanRecord
from lightning_cap.utilities.arguments import require_instance
from lightning_cap.utilities.memory import format_bytes

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 60  # of the chart
_NARROWEST = 110  # columns of a table
_ROWS = 24  # of the table of events, the rest is told
_WHY = {
    "first": "first layer",
    "last": "last layer (head)",
    "excluded": "by exclude",
    "frozen": "frozen",
    "no gradient": "no gradient reaches it",
}


def print_plan(plan: RunPlan, console: Console | None = None) -> None:
    """Print what is pruned, when, and what it costs.

    Args:
        plan: Of `lightning_cap.planning.plan_fit` or `plan_oneshot`.
        console: Where to. Default: standard output.

    Raises:
        ConfigError: An argument is something else.
    """
    require_instance("plan", plan, RunPlan, "plan_fit(trainer, module, data)")
    require_instance("console", console, Console, "rich.console.Console()", optional=True)
    out = console or Console(width=max(_NARROWEST, Console().width))
    machine = plan.machine
    memory = "" if machine.device_bytes is None else f", {format_bytes(machine.device_bytes)} free on each for an event"
    told = f"{plan.command} of {plan.model} on {machine.processes} x {machine.device}{memory}"
    out.print(Text(f"Plan: {told}", style="bold"))
    out.print(f"Model, gradients and optimizer: {format_bytes(machine.model_bytes)} on each device.", highlight=False)
    for choice in plan.choices:
        _print_choice(choice, out)
    if plan.timeline is not None:
        _print_timeline(plan.timeline, plan, out)
    for pruning in plan.pruning:
        _print_pruning(pruning, out, brief=len(plan.pruning) > 2)
    if len(plan.pruning) > 2:
        _print_pruners(plan.pruning, out)
    _print_files(plan, out)
    if plan.seconds is not None and plan.pruning:
        out.print(
            f"All events: about {format_seconds(plan.seconds)}, measured on {plan.machine.measured_on}; training and validation "
            "come besides.",
            highlight=False,
            soft_wrap=True,
        )
    for note in plan.notes:
        out.print(Text(f"Note: {note}"), soft_wrap=True)


def _print_choice(choice: ChoicePlan, out: Console) -> None:
    table = Table(title=Text("What is pruned"), title_justify="left", box=SIMPLE_HEAD)
    for name, justify in (("", "left"), ("weights of layers", "left"), ("count", "right"), ("shape", "left")):
        table.add_column(Text(name), justify=justify, overflow="fold")  # type: ignore[arg-type]
    for name in ("parameters", "FLOPs"):
        table.add_column(Text(name), justify="right")
    reasons = dict.fromkeys(layer.dense for layer in choice.layers)
    for why in sorted(reasons, key=lambda why: why != ""):
        told = "pruned" if not why else f"dense: {_WHY.get(why, why)}"
        for pattern, layers in _alike([layer for layer in choice.layers if layer.dense == why]).items():
            flops = [layer.flops for layer in layers if layer.flops is not None]
            parameters = sum(_numel(layer) for layer in layers)
            shape = "x".join(map(str, layers[0].shape)) or "-"
            cells = told, pattern, str(len(layers)), shape, _short(parameters), _short(sum(flops)) if flops else "-"
            table.add_row(*map(Text, cells))
            told = ""
    table.add_row(*map(Text, ("not a layer", "biases, norms, embeddings", "", "", _short(choice.others), "")))
    out.print(table)
    share = 100 * choice.pruned / max(1, choice.total)
    count = sum(not layer.dense for layer in choice.layers)
    out.print(f"{count} targets, {share:.1f} % of {_short(choice.total)} parameters.", highlight=False)
    if choice.units:
        out.print(Text(f"Units: {choice.units}"), soft_wrap=True)
    if choice.note:
        out.print(Text(f"Note: {choice.note}"), soft_wrap=True)


def _alike(layers: Sequence[LayerRecord]) -> dict[str, list[LayerRecord]]:
    """Layers whose names differ in numbers alone and that have one shape, together: ``blocks.*.mlp.fc1.weight``."""
    groups: dict[tuple[str, tuple[int, ...]], list[LayerRecord]] = {}
    for layer in layers:
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name), layer.shape), []).append(layer)
    found: dict[str, list[LayerRecord]] = {}
    for (pattern, shape), group in groups.items():
        name = group[0].name if len(group) == 1 else pattern
        found[name if name not in found else f"{name} ({'x'.join(map(str, shape))})"] = group
    return found


def _print_timeline(timeline: TimelinePlan, plan: RunPlan, out: Console) -> None:
    epochs = "without an end" if timeline.epochs == -1 else f"{timeline.epochs} epochs"
    out.print(
        f"Timeline: {epochs} of {timeline.steps} optimizer steps, {timeline.scheduler or 'constant learning rate'}.",
        highlight=False,
    )
    points = timeline.points
    if not points:
        return
    top = max(max(point.lr, point.last_lr) for point in points)
    low = min(min(point.lr, point.last_lr) for point in points)
    goals = max((point.goal for point in points), default=0.0)
    counted = plan.pruning[0].counted if plan.pruning else "sparsity"
    if goals:
        bars = _chart(points, lambda point: point.goal)
        out.print(Text(f"  {counted:>9} |{bars}| 0 to {100 * goals:g} %"), soft_wrap=True)
    bars = _chart(points, lambda point: point.lr)
    out.print(Text(f"  {'lr':>9} |{bars}| {low:.2e} to {top:.2e}"), soft_wrap=True)
    out.print(Text(f"  {'epoch':>9}  0{points[-1].epoch:>{len(bars) - 1}}"), soft_wrap=True)


def _chart(points: Sequence[EpochPlan], value: object) -> str:
    """One character for each of at most 60 epochs; its height is the share of the largest value."""
    values = [value(points[i * len(points) // min(_WIDTH, len(points))]) for i in range(min(_WIDTH, len(points)))]  # type: ignore[operator]
    top = max(values) or 1.0
    return "".join(_BARS[round(v / top * (len(_BARS) - 1))] for v in values)


def _print_pruning(plan: PruningPlan, out: Console, brief: bool) -> None:
    if brief:
        return
    out.print(Text(f"{plan.label}: {plan.settings}"), soft_wrap=True, style="bold")
    if plan.prices:
        out.print(f"  goals count {plan.counted}: {plan.prices}", highlight=False, soft_wrap=True)
    out.print(f"  each event, on each process: {_memory(plan.memory)}", highlight=False, soft_wrap=True)
    if plan.samples:
        out.print(f"  reads {plan.samples} {plan.unit}{_cached(plan)}", highlight=False, soft_wrap=True)
    if plan.seconds is not None:
        phases = ", ".join(f"{name} {format_seconds(value)}" for name, value in plan.seconds.items())
        out.print(f"  seconds of each collection: {phases}", highlight=False, soft_wrap=True)
    out.print(_events(plan))
    hidden = len(plan.events) - _ROWS
    if hidden > 0:
        out.print(f"  and {hidden} events more, the last at epoch {plan.events[-1].epoch}", highlight=False)


def _events(plan: PruningPlan) -> Table:
    table = Table(box=SIMPLE_HEAD)
    names = ["epoch", plan.counted, "epochs until the next", "collections", "seconds"]
    training = any(event.epoch is not None for event in plan.events)
    for name in names if training else [names[1], *names[3:]]:
        table.add_column(Text(name), justify="right")
    for event in plan.events[:_ROWS]:
        seconds = "-" if event.seconds is None else format_seconds(event.seconds)
        goal = f"{100 * event.goal:.4g} %"
        own = [goal, str(event.collections), seconds]
        table.add_row(*([str(event.epoch), goal, str(event.cycle or "-"), *own[1:]] if training else own))
    return table


def _print_pruners(plans: Sequence[PruningPlan], out: Console) -> None:
    """A line for each pruner of a comparison."""
    table = Table(title=Text("Pruners"), title_justify="left", box=SIMPLE_HEAD)
    for name in ("pruner", "reads", "rows kept", "bytes", "passes", "collect", "solve", "apply", "all"):
        table.add_column(Text(name), justify="left" if name in ("pruner", "reads") else "right")
    for plan in plans:
        phases = [format_seconds(plan.seconds[p]) if plan.seconds else "-" for p in ("collect", "solve", "apply")]
        reads = f"{plan.samples} {plan.unit}" if plan.samples else "-"
        kept = f"{plan.cached} {format_bytes(plan.cached_bytes)}" if plan.cached_bytes else plan.cached or "-"
        total = "-" if plan.total_seconds is None else format_seconds(plan.total_seconds)
        cells = plan.label, reads, kept, format_bytes(plan.memory.peak_bytes), str(plan.memory.passes), *phases, total
        table.add_row(*map(Text, cells))
    out.print(table)


def _memory(memory: PlanRecord) -> str:
    """``1.2 GiB of 7.5 GiB on cuda, Fisher on cpu (3.1 GiB there), 2 passes, ...``."""
    limit = "" if memory.limit is None else f" of {format_bytes(memory.limit)}"
    where = ""
    if memory.host_bytes:
        where = f", Fisher on {memory.storage_device} ({format_bytes(memory.host_bytes)} of main memory)"
    rows = "" if memory.rows is None else f", {memory.rows} gradient rows at once"
    passes = f"{memory.passes} pass{'es' if memory.passes > 1 else ''} over the data"
    return f"{format_bytes(memory.peak_bytes)}{limit} on {memory.device}{where}, {passes}, {memory.chunk} blocks at a time{rows}"


def _cached(plan: PruningPlan) -> str:
    if not plan.cached:
        return ""
    if not plan.cached_bytes:
        return f", kept for all pruners ({plan.cached})"
    return f", kept for all pruners: {format_bytes(plan.cached_bytes)} of {plan.cached} on each process"


def _print_files(plan: RunPlan, out: Console) -> None:
    if not plan.files:
        out.print("Nothing is written.", highlight=False)
        return
    out.print(Text(f"Written to {plan.folder}: about {format_bytes(plan.disk_bytes)}"), soft_wrap=True)
    for file in plan.files:
        out.print(Text(f"  {file.count} x {file.name}, {format_bytes(file.bytes)} each"), soft_wrap=True)


def format_seconds(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3.5 min`` or ``2.1 h``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _numel(layer: LayerRecord) -> int:
    found = 1
    for size in layer.shape:
        found *= size
    return found if layer.shape else 0


def _short(number: float) -> str:
    """``5.7 M``."""
    for size, letter in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"
