"""Planned and measured peak memory of pruning events, down to an eighth of what each would take.

    python benchmarks/memory.py --threads 1

Every event runs in a process of its own that has loaded its libraries by a tiny one. What an event would take is its plan
without a limit; a pruner with ``max_memory`` is run with that, a half, a quarter and an eighth of it. Measured is the high-water
mark of resident memory (``VmHWM``, on CUDA that of the allocator) less what was resident before; the trial of the first batch
counts. Prints a Markdown table and writes ``results/memory.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from machine import machine
from meter import status
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from lightning_cap import pruners
from lightning_cap.calibration.sources import SourceMemory
from lightning_cap.errors import ConfigError
from lightning_cap.pruners import Pruner
from lightning_cap.pruners.base import prepare
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.memory import release_memory

ROOT = Path(__file__).resolve().parent.parent
CLASSES, SPARSITY = 10, 0.5

#: Image size and how to make it.
MODELS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "deit_tiny": (224, lambda: timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES)),
    "deit_tiny, 4 blocks": (224, lambda: timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES, depth=4)),
    "resnet": (96, lambda: ResNet(BasicBlock, (2, 2, 2, 2), CLASSES, channels=(32, 64, 128, 256))),
    "tiny": (32, lambda: timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, img_size=32, patch_size=8, depth=2)),
}  # fmt: skip
#: Class, settings, and whether it has ``max_memory``.
PRUNERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "CAP": ("CAP", {"damp": 1e-5}, True),
    "CAP, full blocks": ("CAP", {"damp": 1e-5, "storage": "full"}, True),
    "WoodFisher": ("WoodFisher", {"damp": 1e-5}, True),
    "MFAC": ("MFAC", {"damp": 1e-5}, True),
    "FastCAP": ("FastCAP", {}, False),
    "LayerwiseOBS": ("LayerwiseOBS", {}, False),
    "DiagonalFisher": ("DiagonalFisher", {}, False),
    "Magnitude": ("Magnitude", {}, False),
}


class Watched:
    """A source that tells when it has been read, and what was the peak by then."""

    def __init__(self, source: Any, mark: Callable[[], int]) -> None:
        self._source, self._mark, self.peak = source, mark, 0

    def __iter__(self) -> Iterator[Any]:
        for chunk in self._source:
            yield chunk
            del chunk
        self.peak = max(self.peak, self._mark())

    def memory(self) -> SourceMemory:
        """That of the source."""
        return self._source.memory()

    def limit_rows(self, rows: int) -> None:
        """Tell the source, if it computes rows."""
        if hasattr(self._source, "limit_rows"):
            self._source.limit_rows(rows)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def make_pruner(name: str, gradients: int, max_memory: int | None) -> Pruner:
    kind, settings, limited = PRUNERS[name]
    settings = {**settings, **({"max_memory": max_memory} if limited else {})}
    count = {"LayerwiseOBS": "num_inputs"}.get(kind, "num_gradients")
    pruner: Pruner = getattr(pruners, kind)(**settings, **({} if kind == "Magnitude" else {count: gradients}))
    return pruner


def prepared(model: str, pruner: Pruner, gradients: int, batch: int, device: torch.device) -> tuple[Targets, Any]:
    size, make = MODELS[model]
    torch.manual_seed(0)
    net = make().to(device).eval()
    targets = Targets.from_model(net)
    shape = (min(batch, gradients), 3, size, size)
    batches = [
        (torch.randn(shape, device=device), torch.randint(CLASSES, shape[:1], device=device))
        for _ in range(-(-gradients // shape[0]))
    ]
    statistic = pruner.statistic
    return targets, () if statistic is None else statistic.collector(net, targets, loss, batches)


def run(targets: Targets, source: Any, pruner: Pruner) -> Any:
    plan = prepare(pruner, targets, None, source)
    with pruner.path(targets, source) as path:
        path.at(SPARSITY)
    return plan


def measure(model: str, name: str, gradients: int, batch: int, share: int, threads: int, device: str) -> dict[str, Any]:
    """One event in this process."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    warnings.simplefilter("ignore")
    run(*prepared("tiny", make_pruner(name, 8, None), 8, 8, where), make_pruner(name, 8, None))
    targets, collector = prepared(model, make_pruner(name, gradients, None), gradients, batch, where)
    whole = make_pruner(name, gradients, None).plan(targets, source=collector.memory() if collector else SourceMemory())
    limit = whole.peak_bytes // share
    pruner = make_pruner(name, gradients, limit)
    targets, collector = prepared(model, pruner, gradients, batch, where)
    gc.collect()
    release_memory(where)
    found = {"model": model, "pruner": name, "share": share, "limit": limit, "weights": targets.numel}
    mark = _meter(where)
    source = Watched(collector, mark) if collector else ()
    try:
        plan = run(targets, source, pruner)
    except ConfigError as error:
        return {**found, "refused": str(error)}
    after, reading = mark(), getattr(source, "peak", 0)
    measured = max(after, reading)
    return {
        **found,
        "planned": plan.peak_bytes,
        "measured": measured,
        "reading": reading,
        "after": after,
        "ratio": measured / plan.peak_bytes,
        "passes": plan.passes,
        "rows": plan.rows,
    }


def _meter(device: torch.device) -> Callable[[], int]:
    """A function that gives the peak since it was called last, beyond what is in use now."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)

        def mark() -> int:
            peak = torch.cuda.max_memory_allocated(device) - before
            torch.cuda.reset_peak_memory_stats(device)
            return peak
    else:
        before = status("VmRSS")

        def mark() -> int:
            peak = status("VmHWM") - before
            Path("/proc/self/clear_refs").write_text("5")
            return peak

    mark()
    return mark


def in_fresh_process(case: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(case)], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| model | pruner | max_memory | planned, MiB | measured, MiB | measured : planned | passes | rows at once |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        limit = f"1/{r['share']}" if PRUNERS[r["pruner"]][2] else "-"
        cells = ["refused", "", "", "", ""]
        if "refused" not in r:
            sizes = [f"{r[key] / 2**20:,.0f}" for key in ("planned", "measured")]
            cells = [*sizes, f"{r['ratio']:.2f}", str(r["passes"]), str(r["rows"] or "-")]
        lines.append(f"| {r['model']} | {r['pruner']} | {limit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["deit_tiny, 4 blocks", "resnet"])
    parser.add_argument(
        "--pruners", nargs="+", choices=list(PRUNERS), default=[name for name in PRUNERS if name != "CAP, full blocks"]
    )
    parser.add_argument("--shares", nargs="+", type=int, default=[1, 2, 4, 8], help="parts of the memory it would take")
    parser.add_argument("--gradients", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/memory.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.case:
        print(json.dumps(measure(**json.loads(given.case))))
        return None
    settings = {key: getattr(given, key) for key in ("gradients", "batch", "threads", "device")}
    cases = [
        {"model": model, "name": name, "share": share, **settings}
        for model in given.models
        for name in given.pruners
        for share in (given.shares if PRUNERS[name][2] else [1])
    ]
    results: list[dict[str, Any]] = []
    out: dict[str, Any] = {}
    for case in cases:
        results.append(in_fresh_process(case))
        print(table(results).splitlines()[-1], file=sys.stderr)
        out = {"machine": machine(), "settings": settings, "results": results}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(out, indent=2) + "\n")  # after each: what there is stays if it is stopped
    print(table(results))
    return out


if __name__ == "__main__":
    main()
