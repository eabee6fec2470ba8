"""How fast a dense model and what was exported of it really are, measured in turns on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from lightning_cap.errors import ConfigError
from lightning_cap.export.batches import Inputs, arguments, call, checked_inputs, device_of, head, repeated
from lightning_cap.export.records import BENCHMARKS, BenchmarkRecord
from lightning_cap.utilities.arguments import (
    require_callable,
    require_instance,
    require_list,
    require_real,
    require_whole,
    shown,
)
from lightning_cap.utilities.flops import count_flops
from lightning_cap.utilities.machine import this_machine
from lightning_cap.utilities.progress import Progress
from lightning_cap.utilities.records import append_record
from lightning_cap.utilities.timing import Clock, quartiles, ratios, time_in_turns, torch_threads

#: What is called a speed-up.
LEAST_SPEEDUP = 1.05

Models = Mapping[str, Callable[..., Any]]


def benchmark(
    models: Models,
    example_input: Inputs,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    threads: int | None = None,
    files: Mapping[str, Path] | None = None,
    flops: Mapping[str, int] | None = None,
    sparse_kernels: Collection[str] = (),
    seconds: float = 20.0,
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
) -> list[BenchmarkRecord]:
    """Measure models in turns in this process, without gradients.

    Every round calls each model once, in an order that turns; ratios are of calls of the same round, so that what else the
    machine does meets all models alike.

    Args:
        models: ``{name: model}``, the dense one first: torch modules in eval mode, or functions of the batch that wait for their
            result. Functions of another runtime are to use ``threads`` threads by themselves.
        example_input: A tensor ``(n, ...)``, a tuple of arguments, or a dict of named ones; samples are repeated to each batch
            size. Modules get the arguments, functions the tuple or dict itself. Its device is what is measured.
        batch_sizes: Samples in one call.
        threads: Of torch on the CPU. Default: as they are set.
        files: ``{name: file}`` of those models that have one, for its size.
        flops: ``{name: FLOPs on one sample}`` of models that are no torch modules; of those they are counted.
        sparse_kernels: Names of models whose kernels skip zeros.
        seconds: About how long to measure at each batch size, at most.
        progress: Told of every batch size.
        clock: Of what time is taken.

    Returns:
        A record of each model at each batch size.

    Raises:
        ConfigError: An argument is something else, or a model cannot take a batch of that size.
    """
    example_input = checked_inputs("example_input", example_input)
    _check(models, example_input, batch_sizes, seconds, files, flops, sparse_kernels)
    known = {**_counted(models, example_input), **(flops or {})}
    sizes = {name: path.stat().st_size for name, path in (files or {}).items()}
    device = device_of(example_input)
    machine, dense = this_machine(device), next(iter(models))
    records = []
    with torch_threads(threads) as used, torch.inference_mode():
        for done, batch_size in enumerate(batch_sizes):
            if progress is not None:
                progress(f"measuring batch {batch_size}", done, len(batch_sizes))
            times = _times(models, example_input, batch_size, seconds, clock)
            for name, own in times.items():
                low, middle, high = quartiles(ratios(times[dense], own))
                record = BenchmarkRecord(
                    model=name, dense=dense, batch_size=batch_size, milliseconds=quartiles(own)[1], speedup=middle,
                    speedup_low=low, speedup_high=high, runs=len(own), flops=known.get(name), bytes=sizes.get(name),
                    threads=used, device=str(device), machine=machine,
                    remark="",
                )  # fmt: skip
                records.append(record)
    return [_remarked(record, records, record.model in sparse_kernels) for record in records]


def save_benchmark(records: Iterable[BenchmarkRecord], folder: Path) -> None:
    """Add records to ``benchmarks.jsonl``; each takes the place of an earlier one of the same model on the same machine.

    Raises:
        DataError: The file holds something else.
    """
    for record in records:
        append_record(folder / BENCHMARKS, record, partial(_is_same_place, record))


def _is_same_place(record: BenchmarkRecord, other: BenchmarkRecord) -> bool:
    keys = ("model", "batch_size", "threads", "device")
    return (
        all(getattr(record, key) == getattr(other, key) for key in keys) and record.machine.name == other.machine.name
    )


def print_benchmark(records: Sequence[BenchmarkRecord], console: Console | None = None) -> None:
    """Print a table of all models and batch sizes, and below it what is no faster, and why.

    Args:
        records: What `benchmark` returned.
        console: Where to. Default: standard output.
    """
    require_list("records", records, "benchmark(...)")
    for record in records:
        require_instance("records", record, BenchmarkRecord, "benchmark(...)")
    require_instance("console", console, Console, "rich.console.Console()", optional=True)
    table = Table(title="Measured in turns")
    table.add_column("model", overflow="fold")
    for column in ("batch", "ms (median)", "speed-up", "quartiles", "file"):
        table.add_column(column, justify="right")
    for record in records:
        table.add_row(
            Text(record.model),
            str(record.batch_size),
            f"{record.milliseconds:.4g}",
            "-" if record.model == record.dense else f"{record.speedup:.2f}x",
            "-" if record.model == record.dense else f"{record.speedup_low:.2f} to {record.speedup_high:.2f}",
            "-" if record.bytes is None else f"{record.bytes / 1e6:.2f} MB",
        )
    console = console or Console()
    console.print(table)
    for line in [_measured_on(record) for record in records[:1]] + [_remark(r) for r in records if r.remark]:
        console.print(Text(line), soft_wrap=True)


def _remark(record: BenchmarkRecord) -> str:
    return f"{record.model} at batch {record.batch_size}: {record.remark}"


def _measured_on(record: BenchmarkRecord) -> str:
    machine = record.machine
    chip = " and ".join(filter(None, (machine.processor, machine.accelerator)))
    threads = f"{record.threads} thread{'s' if record.threads > 1 else ''}"
    return f"Measured on {machine.name}: {chip}, {record.device}, {threads}, torch {machine.torch}."


def _counted(models: Models, example_input: Inputs) -> dict[str, int]:
    """FLOPs of those that are torch modules."""
    one, flops = head(example_input, 1), {}
    for name, model in models.items():
        if isinstance(model, nn.Module):
            with _telling(name, 1):
                flops[name] = count_flops(call, model, one)
    return flops


def _times(
    models: Models, example_input: Inputs, batch_size: int, seconds: float, clock: Clock
) -> dict[str, list[float]]:
    batch = repeated(example_input, batch_size)
    args, kwargs = arguments(batch)
    calls = {
        name: partial(model, *args, **kwargs) if isinstance(model, nn.Module) else partial(model, batch)
        for name, model in models.items()
    }
    for name, run in calls.items():
        with _telling(name, batch_size):
            run()
    return time_in_turns(calls, device=device_of(batch), seconds=seconds, clock=clock)


@contextmanager
def _telling(name: str, batch_size: int) -> Iterator[None]:
    """What a model raises, as one line of ours."""
    try:
        yield
    except Exception as error:
        told = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"batch_sizes: {name!r} cannot take a batch of {batch_size} ({type(error).__name__}: {told}). Give an "
            "example_input and sizes that it takes."
        ) from error


def _remarked(record: BenchmarkRecord, records: Sequence[BenchmarkRecord], skips_zeros: bool) -> BenchmarkRecord:
    """With the reason, if it is no faster than the dense one, or if that cannot be told."""
    if record.model == record.dense or record.speedup_low >= LEAST_SPEEDUP:
        return record
    varies = (
        f"times vary too much to tell (quartiles {record.speedup_low:.2f}x to {record.speedup_high:.2f}x). Measure again while "
        "the machine does nothing else."
    )
    if record.speedup >= LEAST_SPEEDUP:
        return replace(record, remark=varies if record.speedup_low < 1 else "")
    dense = next(r for r in records if r.model == record.dense and r.batch_size == record.batch_size)
    reason = _reason(record, dense, skips_zeros) or (
        varies if record.speedup_high >= LEAST_SPEEDUP else _slower(record, dense)
    )
    return replace(record, remark=f"no speed-up here: {reason}")


def _reason(record: BenchmarkRecord, dense: BenchmarkRecord, skips_zeros: bool) -> str:
    """Of what does not compute less; empty for what does."""
    if record.flops is None or not dense.flops:
        return "how much it computes is not known."
    share = _share(record, dense)
    if skips_zeros and share > 0.95:
        return "its kernels skip zeros, but at these sizes that gains nothing. Prune units and shrink the model (--shrink)."
    if share > 0.95:
        return (
            f"it computes as much ({share:.0%} of the FLOPs). Zeros inside a weight are multiplied like other numbers by dense "
            "kernels. Prune units and shrink the model (--shrink)."
        )
    return ""


def _slower(record: BenchmarkRecord, dense: BenchmarkRecord) -> str:
    """Of what computes less."""
    before, after = (_rate(one) for one in (dense, record))
    return (
        f"it computes {_share(record, dense):.0%} of the FLOPs, "
        f"but only {after:.3g} instead of {before:.3g} GFLOP/s: what is left takes its time "
        "for memory and for starting each layer, not for arithmetic. Try a larger batch, fewer threads or another runtime."
    )


def _share(record: BenchmarkRecord, dense: BenchmarkRecord) -> float:
    return (record.flops or 0) / max(dense.flops or 0, 1)


def _rate(record: BenchmarkRecord) -> float:
    """GFLOP/s."""
    return (record.flops or 0) * record.batch_size / max(record.milliseconds, 1e-9) / 1e6


def _check(
    models: Models, example_input: object, batch_sizes: Sequence[int], seconds: object,
    files: Mapping[str, Path] | None, flops: Mapping[str, int] | None, sparse_kernels: Collection[str],
) -> None:  # fmt: skip
    require_instance("models", models, Mapping, "{'dense': model, 'shrunk': smaller}")
    if len(models) < 2:
        raise ConfigError(f"models={shown(models)}: give the dense model first, and one or more to compare it with.")
    for name, model in models.items():
        of_several = isinstance(model, nn.Module) and not isinstance(example_input, Tensor)
        require_callable(
            f"models[{name!r}]", model, "a torch model in eval mode", num_arguments=None if of_several else 1
        )
        if isinstance(model, nn.Module) and any(part.training for part in model.modules()):
            raise ConfigError(f"models[{name!r}]={type(model).__name__}: it is in training mode. Call eval() on it.")
    require_list("batch_sizes", batch_sizes, "[1, 32]")
    if not batch_sizes:
        raise ConfigError(f"batch_sizes={shown(batch_sizes)}: give at least one, such as [1, 32].")
    for size in batch_sizes:
        require_whole("batch_sizes", size, example=32)
    require_real("seconds", seconds, "(0, inf)", example=20.0)
    for argument, value in (("files", files), ("flops", flops)):
        require_instance(argument, value, Mapping, "{'shrunk': ...}, by names of models", optional=True)
    require_list("sparse_kernels", sparse_kernels, "['semi_structured']")
    for argument, names in (("files", files or {}), ("flops", flops or {}), ("sparse_kernels", sparse_kernels)):
        for name in names:
            if name not in models:
                raise ConfigError(f"{argument}: {shown(name)} is none of the models. Give names of {sorted(models)}.")
    for name, path in (files or {}).items():
        if not isinstance(path, Path) or not path.is_file():
            raise ConfigError(f"files: {name!r} is {shown(path)}, which is no file. Give the path of the exported one.")
    for name, count in (flops or {}).items():
        require_whole(f"flops[{name!r}]", count, at_least=0)
