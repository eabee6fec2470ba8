"""What an event costs each of ``R`` ranks, on paper. `scaling.py` checks it against measured ranks and prints it for GPUs.

For ``d`` weights in blocks of ``B``, ``N`` gradients in batches of ``n``, and ``d' = d/R`` weights a rank (whole blocks):

    rows of the busiest rank   N' = n ceil(ceil(N/n) / R)
    rows sent to the others    4 N' d (R-1)/R bytes
    Fisher                     4 d' B bytes, packed 2 d' (B+1)
    adding up the Fisher       2 N d' B operations, packed N d' (B+1); the Fisher is read and written once in 32 rows
    factors and elimination    2 d' B^2 operations: B^3 of Cholesky and inverse, up to B^3 of elimination, a block
    reconstruction             d' B^2 (1-s)^3 / 3 operations at sparsity s
    selection                  two histograms of 512 KiB, summed: 2^21 (R-1)/R bytes sent
    weights and masks          4 d (1 + 1/32) (R-1)/R bytes sent
    collectives                3 a round of batches and 20 besides, each log2(R) latencies
    model and Adam's state     16 d bytes: weights, gradients, two moments

Of a model that FSDP2 shares out in ``u`` units, a rank computes one row at a time, of ``n = 2`` in a batch:

    weights lent               8 N' d (R-1)/R bytes: each unit is made whole in the forward and in the backward pass
    weights and masks sent     less than a block for each target: left out
    collectives                3 a unit and row besides
    model and Adam's state     16 d' bytes

All-gathers and all-reduces are counted as rings. Peak memory is that of `lightning_cap.fisher.memory_plan`. What every rank
does for all ``d`` weights (packing, checksums) is a few passes over ``28 d`` bytes and left out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from lightning_cap.calibration.gradients import rows_at_once
from lightning_cap.calibration.sources import SourceMemory
from lightning_cap.fisher.blocks import ROW_CHUNK, fisher_bytes
from lightning_cap.fisher.memory_plan import MemoryModel

MIB, GIB = 2**20, 2**30
#: Every phase that is told apart.
PHASES = {
    "collect": "forward and backward",
    "exchange": "exchange of rows",
    "accumulate": "adding up the Fisher",
    "solve": "elimination",
    "select": "selection",
    "reconstruct": "reconstruction",
    "gather": "handing out weights and masks",
    "agree": "counts and agreement, waiting included",
    "rest": "the rest: plan, packing, checksums",
}
#: Phase -> amount that its CPU seconds are proportional to.
BASIS = {
    "collect": "rows",
    "exchange": "exchange",
    "accumulate": "accumulate",
    "solve": "solve",
    "select": "solve",
    "reconstruct": "reconstruct",
    "gather": "gather",
}
#: All Linear weights of the blocks of these timm models.
WEIGHTS = {
    "DeiT-Small": 12 * 12 * 384**2,
    "DeiT-Base": 12 * 12 * 768**2,
    "ViT-giant": 40 * 1408 * (4 * 1408 + 2 * 6144),
}
_UNITS = {"ViT-giant": 40}  # of fully_shard, where a GPU would hardly hold the model and its state
_NETWORK = ("exchange", "gather")  # nothing of it on one rank


@dataclass(frozen=True)
class Problem:
    """What is pruned.

    Attributes:
        weights: ``d``.
        gradients: ``N``.
        block_size: ``B``.
        batch: ``n``, gradients that a rank computes between two exchanges.
        sparsity: ``s``.
        packed: Fisher blocks are kept as triangles, or full.
        device: ``"cpu"`` or ``"cuda"``.
        units: Of `fully_shard`, ``u``; 0 where every rank holds all weights.
    """

    weights: int
    gradients: int
    block_size: int
    batch: int
    sparsity: float
    packed: bool
    device: str = "cuda"
    units: int = 0


@dataclass(frozen=True)
class Rates:
    """What one rank can do.

    Attributes:
        sample: Seconds of a gradient, forward and backward.
        accumulate: Operations/s of the products that are added up.
        solve: Operations/s of factors, elimination and reconstruction.
        memory: Bytes/s of its memory.
        node: Bytes/s that it sends to ranks of its own node.
        network: Bytes/s that it sends to other nodes.
        latency: Seconds of one message.
        node_size: Ranks of a node.
    """

    sample: float
    accumulate: float
    solve: float
    memory: float
    node: float
    network: float
    latency: float
    node_size: int = 8


def amounts(p: Problem, ranks: int) -> dict[str, float]:
    """Bytes, operations and collectives of one rank."""
    d, B, others = p.weights, p.block_size, (ranks - 1) / ranks
    blocks = _parts(d, B)
    own = _parts(blocks, ranks)
    rounds = _parts(_parts(p.gradients, p.batch), ranks)
    rows = min(p.gradients, rounds * p.batch)
    device = torch.device(p.device)
    storage, backend = "packed" if p.packed else "full", "numba" if p.device == "cpu" else "triton"
    fisher = fisher_bytes(own, B, storage, device)
    if p.units:  # on paper: without activations
        held = 4 * _parts(d, ranks) * p.batch * ranks
        source = SourceMemory(8 * _parts(d, p.units), held, held)  # weights and gradients of a unit
        sizes = MemoryModel(B, own, ROW_CHUNK, storage, backend, source)
    else:
        source = SourceMemory(0, 4 * d, 4 * d, p.batch, p.batch)
        sizes = MemoryModel(B, blocks, ROW_CHUNK, storage, backend, source, ranks)
    return {
        "model": 16 * (_parts(d, ranks) if p.units else d),
        "rows": rows,
        "fisher": fisher,
        "planned": sizes.bytes_on_device(own, device, min(own, sizes.chunk(device, None)), source.most),
        "exchange": 4 * rows * d * others,
        "lent": 8 * rows * d * others if p.units else 0,
        "gather": 0 if p.units else 4 * d * (1 + 1 / 32) * others,
        "select": 2**21 * others,
        "accumulate": p.gradients * own * B * (B + 1 if p.packed else 2 * B),
        "traffic": 2 * fisher * _parts(p.gradients, ROW_CHUNK),
        "solve": 2 * own * B**3,
        "reconstruct": own * B**3 * (1 - p.sparsity) ** 3 / 3,
        "collectives": (3 * rounds + 20 + 3 * rows * p.units) * math.ceil(math.log2(ranks)),
    }


def _parts(whole: int, size: int) -> int:
    return -(-whole // size)


def seconds(p: Problem, ranks: int, rates: Rates) -> dict[str, float]:
    """Of each phase, if nothing overlaps."""
    need = amounts(p, ranks)
    outside = max(0, ranks - rates.node_size) / max(1, ranks - 1)  # of a rank's peers, those on other nodes
    a_byte = (1 - outside) / rates.node + outside / rates.network
    return {
        "collect": need["rows"] * rates.sample,
        "lend": need["lent"] * a_byte,
        "exchange": need["exchange"] * a_byte,
        "accumulate": max(need["accumulate"] / rates.accumulate, need["traffic"] / rates.memory),
        "solve": need["solve"] / rates.solve,
        "select": need["select"] * a_byte,
        "reconstruct": need["reconstruct"] / rates.solve,
        "gather": need["gather"] * a_byte,
        "agree": need["collectives"] * rates.latency,
    }


def check(problem: Problem, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``(on paper, measured)`` of every run but the first, which is that of one rank.

    The rates are those of the first run; of what goes over the network, those of the second, of which they then say nothing.
    """
    paper = {run["ranks"]: amounts(problem, run["ranks"]) for run in runs}
    out = []
    for run in runs[1:]:
        said, cpu = paper[run["ranks"]], {}
        for phase, amount in BASIS.items():
            base = runs[1] if phase in _NETWORK else runs[0]
            cpu[phase] = base["cpu"][phase] * said[amount] / paper[base["ranks"]][amount]
        out.append(
            {
                "ranks": run["ranks"],
                "cpu": {phase: (value, run["cpu"][phase]) for phase, value in cpu.items()},
                "bytes": {
                    "fisher": (said["fisher"], run["fisher"]),
                    **{key: (said[key], run["sent"][key]) for key in ("exchange", "select", "gather")},
                    "peak": (said["planned"], run["peak"]["all"]),
                },
            }
        )
    return out


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def check_table(checks: Sequence[dict[str, Any]]) -> str:
    """The model beside the measured ranks."""
    head = ["a rank"]
    for one in checks:
        head += [f"{one['ranks']} ranks, on paper", "measured"]
    names = {
        "fisher": "Fisher",
        "exchange": "rows sent",
        "select": "histograms sent",
        "gather": "weights and masks sent",
        "peak": "peak extra memory (on paper: without activations)",
    }
    rows = []
    for key, name in names.items():
        rows.append([f"{name}, MiB", *(f"{value / MIB:.2f}" for one in checks for value in one["bytes"][key])])
    for phase in BASIS:
        cells = []
        for one in checks:
            said, found = one["cpu"][phase]
            cells += ["" if phase in _NETWORK and one is checks[0] else f"{said:.2f}", f"{found:.2f}"]
        rows.append([f"{PHASES[phase]}, CPU s", *cells])
    return grid(head, rows)


def gpu_table(name: str, problem: Problem, gpus: Sequence[int], rates: Rates) -> str:
    """Bytes and seconds a GPU, by the model alone."""
    need = [amounts(problem, ranks) for ranks in gpus]
    took = [seconds(problem, ranks, rates) for ranks in gpus]
    units = {
        "rows": ("gradients of the busiest", 1, 0),
        "model": ("model and Adam's state, GiB", GIB, 2),
        "fisher": ("Fisher, GiB", GIB, 3),
        "planned": ("planned peak memory of the event, GiB", GIB, 2),
        "exchange": ("rows sent, GiB", GIB, 2),
        "lent": ("weights lent by FSDP2, GiB", GIB, 2),
        "gather": ("weights and masks sent, GiB", GIB, 3),
    }
    rows = [[title, *(f"{one[key] / unit:,.{d}f}" for one in need)] for key, (title, unit, d) in units.items()]
    names = {**PHASES, "lend": "weights lent by FSDP2"}
    rows += [[f"{names[key]}, s", *(f"{one[key]:.3f}" for one in took)] for key in took[0]]
    if not problem.units:
        rows = [row for row in rows if not row[0].startswith("weights lent")]
    rows.append(["**all, s**", *(f"**{sum(one.values()):.2f}**" for one in took)])
    return grid([f"{name}, a GPU of", *map(str, gpus)], rows)


def add_assumptions(parser: argparse.ArgumentParser) -> None:
    """What the GPUs are taken to do."""
    group = parser.add_argument_group("assumed for the tables on paper, not measured")
    group.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    group.add_argument("--gpu-gradients", type=int, default=4096)
    group.add_argument("--gpu-sparsity", type=float, default=0.5)
    group.add_argument(
        "--sample-seconds",
        type=float,
        nargs=3,
        default=[0.002, 0.0075, 0.115],
        metavar=("SMALL", "BASE", "GIANT"),
        help="forward and backward of an image through DeiT-Small, DeiT-Base and ViT-giant",
    )
    group.add_argument("--gpu-flops", type=float, default=20e12, help="float32 operations/s of the Fisher's products")
    group.add_argument("--gpu-solve-flops", type=float, default=1e12, help="operations/s of factors and elimination")
    group.add_argument("--gpu-memory", type=float, default=2e12, help="bytes/s of a GPU's memory")
    group.add_argument("--node", type=float, default=150e9, help="bytes/s from a GPU to those of its node")
    group.add_argument("--node-size", type=int, default=8, help="GPUs of a node")
    group.add_argument("--network", type=float, default=20e9, help="bytes/s from a GPU to other nodes")
    group.add_argument("--latency", type=float, default=20e-6, help="seconds of a message")


def gpu_tables(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What is assumed, what follows from it, and both for the reader."""
    names = ("gpu_flops", "gpu_solve_flops", "gpu_memory", "node", "network", "latency", "node_size")
    assumed = {name: getattr(options, name) for name in (*names, "sample_seconds", "gpu_gradients", "gpu_sparsity")}
    out: dict[str, Any] = {}
    tables = []
    for (name, weights), sample in zip(WEIGHTS.items(), options.sample_seconds, strict=True):
        rates = Rates(sample, *(assumed[key] for key in names))
        for units in sorted({0, _UNITS.get(name, 0)}):
            given = SimpleNamespace(numel=weights, is_sharded=units > 0)
            batch = max(2, rows_at_once(given) // 2 * 2)  # as `CalibrationBatches` makes them
            sizes = options.gpu_gradients, 192, batch, options.gpu_sparsity
            problem = Problem(weights, *sizes, packed=name in _UNITS, units=units)
            title = f"{name}, sharded (FSDP2)" if units else name
            out[title] = [
                {"gpus": ranks, "amounts": amounts(problem, ranks), "seconds": seconds(problem, ranks, rates)}
                for ranks in options.gpus
            ]
            heading = f"{title}, {weights:,} weights, batches of {batch}" + ", triangles" * problem.packed
            tables.append(gpu_table(heading, problem, options.gpus, rates))
    samples = ", ".join(f"{1e3 * s:g}" for s in options.sample_seconds)
    text = (
        f"On paper, for GPUs; nothing in these tables is measured. {options.gpu_gradients} gradients, blocks of 192, float32. "
        f"Assumed: {samples} ms for an image forward and backward through {', '.join(WEIGHTS)}; "
        f"{options.gpu_flops / 1e12:g} Tflop/s for the Fisher and {options.gpu_solve_flops / 1e12:g} for the solver; "
        f"{options.gpu_memory / 1e12:g} TB/s of memory; {options.node_size} GPUs a node, {options.node / 1e9:g} GB/s from a GPU to "
        f"the others of its node and {options.network / 1e9:g} GB/s to other nodes, {1e6 * options.latency:g} µs of latency; "
        "nothing overlaps."
    )
    return assumed, out, [text, *tables]
