"""The Fisher-block engine against the published procedure, side by side in one run, and against what the machine could do.

    python benchmarks/engine.py                     # all of it; on 2 cores about a quarter of an hour
    python benchmarks/engine.py --rows elimination  # event, elimination, growth, share, kernels, gpu
    python benchmarks/engine.py --rows kernels gpu  # all that is about a GPU; kernels needs none

Every measurement is a process of its own, of one thread or ``--threads``. Events of both engines take turns, ``--repeats``
times, and the least time of each counts, on gradients that are made on the fly outside the measured time. Prints Markdown
tables and writes ``results/engine.json``. Without a GPU its rows say so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_cases import Case
from engine_elimination import flops
from engine_gpu import model_cases
from engine_kernels import MULTIPROCESSORS, kernel_lines
from engine_limits import gpu_limit_lines, limit_lines
from engine_share import ShareCase
from limits import SECONDS, limits
from machine import machine

import lightning_cap
from lightning_cap.utilities.files import save_json

HERE = Path(__file__).resolve().parent
ROWS = ("event", "elimination", "growth", "share", "kernels", "gpu")
NOT_MEASURED = "not measured (no GPU)"
NO_GPU = "No GPU is at hand (torch.cuda.is_available() is False): the rows of gpu say so, those of kernels need none."
# glibc keeps small freed arrays instead of giving them back and faulting them in again: the same for both engines
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**28)}


@dataclass(frozen=True)
class MemoryModel:
    """How large everything is."""

    weights: int = 442_368
    block_size: int = 192
    num_gradients: int = 512
    blocks: tuple[int, ...] = (64, 128, 192)
    elimination_blocks: int = 128
    elimination_seconds: float = 2.0
    kernel_blocks: tuple[int, ...] = (64, 128, 192, 256)
    kernel_archs: tuple[int, ...] = tuple(MULTIPROCESSORS)
    gpu_rows: int = 4096
    gpu_few: int = 64
    gpu_depth: int = 12
    share_models: tuple[str, ...] = ("vit_tiny_patch16_224", "deit_tiny_patch16_224")
    share_gradients: tuple[int, ...] = (128, 1024)
    share_options: dict[str, Any] = field(default_factory=dict)


SMALL = {"depth": 1, "img_size": 32}
QUICK = MemoryModel(6144, 16, 32, (8, 16), 16, 0.05, (16,), (80,), 32, 2, 1, ("vit_tiny_patch16_224",), (4,), SMALL)


@dataclass(frozen=True)
class Line:
    """A line of the table: ``ratio`` is what the target is about; None where there is none."""

    work: str
    theirs: str
    ours: str
    ratio: str
    target: str


def child(script: str, spec: dict[str, Any], threads: int) -> dict[str, Any]:
    """Run a script of this folder with a JSON argument; its last line is its answer.

    Raises:
        RuntimeError: It failed.
    """
    path = os.pathsep.join([str(Path(lightning_cap.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path.rstrip(os.pathsep)}
    command = [sys.executable, str(HERE / script), json.dumps(spec)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} failed: {' '.join(done.stderr.strip().splitlines()[-3:])}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def in_turns(cases: dict[str, Case], repeats: int) -> dict[str, dict[str, Any]]:
    """Each case ``repeats`` times, in turns; the fastest run of each, with the seconds of all and the highest peak."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            others = busy_cores()
            runs[name].append({**child("engine_cases.py", asdict(case), case.threads), "busy_cores": others})
    found = {}
    for name, results in runs.items():
        best = min(results, key=lambda result: float(result["seconds"]))
        peaks = [result["peak_bytes"] for result in results]
        found[name] = {
            **best,
            "runs": [result["seconds"] for result in results],
            "busy_cores": [result["busy_cores"] for result in results],
            "peak_bytes": max_or_none(peaks),
        }
    return found


def busy_cores(seconds: float = 0.3) -> float | None:
    """Cores that other programs use while this one sleeps; None where Linux does not tell."""
    path = Path("/proc/stat")
    if not path.exists():
        return None

    def idle() -> int:
        fields = path.read_text().split("\n", 1)[0].split()
        return int(fields[4]) + int(fields[5])

    before, started = idle(), time.perf_counter()
    time.sleep(seconds)
    resting = (idle() - before) / os.sysconf("SC_CLK_TCK") / (time.perf_counter() - started)
    return round(max(0.0, (os.cpu_count() or 1) - resting), 1)


def max_or_none(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def event_rows(sizes: MemoryModel, threads: int, repeats: int) -> tuple[dict[str, Any], list[Line]]:
    """The whole event on well- and ill-conditioned blocks, and its memory."""
    found: dict[str, Any] = {}
    lines = []
    for kind, target in (("well", ">= 20"), ("ill", ">= 8")):
        common = (kind, sizes.weights, sizes.block_size, sizes.num_gradients, threads)
        cases = {"published": Case("published", *common), "ours": Case("ours", *common)}  # type: ignore[arg-type]
        found[kind] = in_turns(cases, repeats)
        theirs, ours = found[kind]["published"], found[kind]["ours"]
        precision = f"{ours['blocks_float64']:.0f} of {sizes.weights // sizes.block_size} blocks in float64"
        lines.append(
            Line(
                f"event, d = {sizes.weights}, B = {sizes.block_size}, N = {sizes.num_gradients}, {threads} threads, {precision}",
                f"{theirs['seconds']:.2f} s",
                f"{ours['seconds']:.2f} s",
                f"{theirs['seconds'] / ours['seconds']:.1f}",
                target,
            )
        )
    full = Case("ours", "well", *common[1:], options={"storage": "full"})
    found["full"] = in_turns({"ours": full}, 1)
    theirs = found["well"]["published"]["peak_bytes"]
    for name, key, target in (("full blocks", "full", "<= 0.65"), ("packed blocks", "well", "<= 0.33")):
        ours = found[key]["ours"]["peak_bytes"]
        ratio = "-" if theirs is None or ours is None else f"{ours / theirs:.2f}"
        lines.append(Line(f"peak extra memory of it, {name}", megabytes(theirs), megabytes(ours), ratio, target))
    return found, lines


def megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f} MB"


def elimination_rows(sizes: MemoryModel, peak: dict[str, Any]) -> tuple[dict[str, Any], list[Line]]:
    """Elimination alone, one thread, to three quarters and to the end."""
    found: dict[str, Any] = {}
    lines = []
    for block_size in sizes.blocks:
        for steps in (block_size * 3 // 4, block_size):
            spec = {"block_size": block_size, "num_blocks": sizes.elimination_blocks, "steps": steps}
            ways = child("engine_elimination.py", {**spec, "seconds": sizes.elimination_seconds}, 1)
            done, work = ways["numba"]["blocks_s"], flops(block_size, steps)
            fraction = done * work["needed"] / (peak["float32"]["1"] * 1e9)
            use_float64 = ways["numba, float64"]["blocks_s"] * work["needed"] / (peak["float64"]["1"] * 1e9)
            found[f"B={block_size} K={steps}"] = {
                "ways": ways, "flops": work, "fraction_of_fma_peak": {"float32": fraction, "float64": use_float64},
            }  # fmt: skip
            for name in ("rank-1, as published", "rank-1, in place", "torch left-looking"):
                theirs = ways[name]["blocks_s"]
                lines.append(
                    Line(
                        f"elimination alone, one thread, B = {block_size}, K = {steps}, against {name}",
                        f"{theirs:,.0f} blocks/s",
                        f"{done:,.0f} blocks/s, {100 * fraction:.0f} % of FMA peak",
                        f"{done / theirs:.1f}",
                        ">= 15, >= 12 %" if name == "rank-1, as published" and block_size == 192 else "",
                    )
                )
    return found, lines


def growth_rows(sizes: MemoryModel, threads: int, repeats: int) -> tuple[dict[str, Any], list[Line]]:
    """Our event's time over ``d`` and over ``B``."""
    low, high = sizes.blocks[0], sizes.blocks[-1]
    shapes = {"large": (4 * sizes.weights, high), "small": (sizes.weights, high), "narrow": (sizes.weights, low)}
    cases = {name: Case("ours", "well", d, B, sizes.num_gradients, threads) for name, (d, B) in shapes.items()}
    found = in_turns(cases, repeats)
    seconds = {name: found[name]["seconds"] for name in cases}
    exponent = math.log(seconds["small"] / seconds["narrow"]) / math.log(high / low)
    lines = [
        Line(f"event, d x 4, B = {high}", f"{seconds['small']:.2f} s", f"{seconds['large']:.2f} s",
             f"{seconds['large'] / seconds['small']:.2f}", "4 +- 10 %"),
        Line(f"event, B = {low} -> {high}, d = {sizes.weights}", f"{seconds['narrow']:.2f} s", f"{seconds['small']:.2f} s",
             f"B^{exponent:.2f}", "<= B^2"),
    ]  # fmt: skip
    return found, lines


def share_rows(sizes: MemoryModel, threads: int) -> tuple[dict[str, Any], list[Line]]:
    """What forward and backward passes take of an event's CPU seconds, and its memory against its plan."""
    found: dict[str, Any] = {}
    lines = []
    for model, count in itertools.product(sizes.share_models, sizes.share_gradients):
        case = ShareCase(model, count, sizes.block_size, threads=threads, model_options=sizes.share_options)
        found[f"{model}, N = {count}"] = ours = child("engine_share.py", asdict(case), threads)
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in ours["cpu_seconds"].items())
        work = f"CPU seconds of an event on {model}, N = {count}, B = {sizes.block_size}, damp {case.damp:g}, {threads} threads"
        lines.append(Line(work, "", phases, f"{100 * ours['share']:.0f} % in gradients", ">= 80 %"))
        peak, planned = ours["peak_bytes"], ours["planned_bytes"]
        ratio = "-" if peak is None else f"{peak / planned:.2f}"
        lines.append(Line("its peak memory against its plan", megabytes(planned), megabytes(peak), ratio, "1 +- 10 %"))
    return found, lines


def kernel_facts(sizes: MemoryModel) -> tuple[list[dict[str, Any]] | None, list[str]]:
    """What the kernels for a GPU take of one, as a table; or why it cannot be told."""
    spec = {"block_sizes": sizes.kernel_blocks, "archs": sizes.kernel_archs, "dtypes": ["float32", "float64"]}
    try:
        found = child("engine_kernels.py", spec, 1)
    except RuntimeError as error:
        return None, [f"The kernels for a GPU were not compiled: {error}"]
    return found["kernels"], kernel_lines(found["kernels"])


def gpu_rows(sizes: MemoryModel, options: dict[str, Any]) -> tuple[dict[str, Any] | None, list[Line]]:
    """Phases at DeiT-Small's size and whole events; each in a process of its own, and a failure is a row."""
    targets = {
        "DeiT-Small, 16 images a gradient": "<= 60 s, >= 80 % in the gradients",
        "DeiT-Small, per sample": "<= 15 s",
    }
    cases = model_cases(sizes.gpu_rows, sizes.gpu_few)
    phase_targets = {"accumulate": "<= 4 s", "factor": "<= 1 s", "eliminate": "<= 0.5 s"}
    if not torch.cuda.is_available():
        lines = [Line(f"GPU, {name}", "", NOT_MEASURED, "", target) for name, target in phase_targets.items()]
        return None, lines + [Line(f"GPU event, {n}", "", NOT_MEASURED, "", targets.get(n, "completes")) for n in cases]
    found: dict[str, Any] = {}
    lines = []
    spec = {"num_rows": sizes.gpu_rows, "depth": sizes.gpu_depth, "block_size": 192}
    found["phases"] = attempt({"phases": spec, "options": options})
    for name, target in phase_targets.items():
        seconds = found["phases"].get("seconds", {}).get(name)
        lines.append(Line(f"GPU, {name}", "", found["phases"].get("error") or f"{seconds:.2f} s", "", target))
    for name, case in cases.items():
        found[name] = event = attempt({"event": asdict(case), "options": options})
        shown = event.get("error") or (
            f"{event['seconds']:.1f} s, {100 * event['share_gradients']:.0f} % in the gradients, {event['passes']} passes, "
            f"Fisher on {event['storage_device']}, peak {megabytes(event['peak_bytes'])}"
        )
        work = f"GPU event, {name}, N = {case.num_gradients} x {case.samples}"
        lines.append(Line(work, "", shown, "", targets.get(name, "completes")))
    return found, lines


def attempt(spec: dict[str, Any]) -> dict[str, Any]:
    try:
        return child("engine_gpu.py", spec, os.cpu_count() or 1)
    except RuntimeError as error:
        return {"error": str(error)}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=2, help="of the events on the CPU")
    parser.add_argument("--repeats", type=int, default=3, help="of every event")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument(
        "--gpu-options", type=json.loads, default={}, help="JSON: further arguments of CAP for the GPU's rows"
    )
    parser.add_argument("--output", type=Path, default=HERE / "results/engine.json")
    given = parser.parse_args(arguments)
    sizes = QUICK if given.quick else MemoryModel()
    torch.set_num_threads(given.threads)
    found: dict[str, Any] = {
        "machine": machine(),
        "limits": limits(0.02 if given.quick else SECONDS),
        "sizes": asdict(sizes),
        "repeats": given.repeats,
    }
    peak = found["limits"]["gflops"]
    lines: list[Line] = []
    extra: list[str] = []
    for row in given.rows:
        if row == "event":
            found[row], new = event_rows(sizes, given.threads, given.repeats)
            extra += ["", *limit_lines(sizes.block_size, found[row], found["limits"], given.threads)]
        elif row == "elimination":
            found[row], new = elimination_rows(sizes, peak)
        elif row == "growth":
            found[row], new = growth_rows(sizes, given.threads, given.repeats)
        elif row == "share":
            found[row], new = share_rows(sizes, given.threads)
        elif row == "kernels":
            found[row], table = kernel_facts(sizes)
            new = []
            extra += ["", *table]
        else:
            found[row], new = gpu_rows(sizes, given.gpu_options)
            extra += ["", *gpu_limit_lines(found[row], found["limits"])] if found[row] else ["", NO_GPU]
        lines += new
        save_json(given.output, {**found, "table": [asdict(line) for line in lines]})
        print(f"{row}: done", file=sys.stderr)
    if lines:
        print("| work | theirs or before | ours | ratio | target |\n|---|---:|---:|---:|---|")
    for line in lines:
        print(f"| {line.work} | {line.theirs} | {line.ours} | {line.ratio} | {line.target} |")
    print("\n".join(extra))
    busy = [b for row in ("event", "growth") for b in others(found.get(row, {})) if b is not None]
    if busy:
        print(f"\nCores that other programs used right before the events: {', '.join(map(str, busy))}.")
    return found


def others(found: Any) -> list[float | None]:
    """Every ``busy_cores`` in nested results."""
    if not isinstance(found, dict):
        return []
    return [*found.get("busy_cores", []), *(b for value in found.values() for b in others(value))]


if __name__ == "__main__":
    main()
