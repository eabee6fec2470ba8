"""What sharding a pruning event over processes gains: seconds, memory and bytes a rank, measured on CPUs, then on paper.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py

Measured: 1, 2 and 4 gloo processes of one thread each prune the same small ViT from the same gradients, by the package's own
path; first with all weights on every process, as under DDP, then with the model shared out over them by `fully_shard` (FSDP2),
a unit for each of its blocks. Times are exclusive: a phase that begins inside another pauses it. Seconds are the clock's, and
CPU seconds those of the whole process; of all ranks the largest is shown. Where there are more processes than cores they take
turns, so only the CPU seconds can fall as 1/R. Peak memory is the high-water mark of the resident set in each phase, less what
was resident before the event (Linux only); so the Fisher counts in every phase in which it exists. Bytes are what a rank hands
to the network: all-gathers and all-reduces are counted as rings.

`paper_model.py` is checked against these runs and then fed with assumed rates of GPUs: no second on a GPU is measured here.
Prints Markdown tables and writes ``results/scaling.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from machine import machine
from meter import Meter
from paper_model import MIB, PHASES, Problem, add_assumptions, check, check_table, gpu_tables, grid
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_cap.calibration.statistics import GradientSamples
from lightning_cap.fisher.blocks import EmpiricalFisher, fisher_bytes
from lightning_cap.pruners import CAP, blockwise, blockwise_path, cap
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from lightning_cap.utilities.sharded import whole

ROOT = Path(__file__).resolve().parent.parent
HOOKS: tuple[tuple[Any, str, str], ...] = (
    (distributed, "exchange", "exchange"),
    (distributed, "gather_counts", "agree"),
    (distributed, "gather_objects", "agree"),
    (EmpiricalFisher, "update", "accumulate"),
    (EmpiricalFisher, "finish", "accumulate"),
    (cap, "eliminate", "solve"),
    (cap, "block_scores", "select"),
    (blockwise_path, "select", "select"),
    (blockwise, "reconstruct", "reconstruct"),
    (blockwise_path, "gather_rows", "gather"),
)
NEW = ("exchange", "gather", "agree")  # with several ranks only
CHECKED = (
    "The paper model beside the measured ranks. Its seconds are those of one rank, reduced as the amounts are; for what goes over "
    "the network, those of two ranks."
)


@dataclass(frozen=True)
class Settings:
    """What is pruned: a ViT of ``depth · 12 · width²`` weights, on every process or shared out over them."""

    width: int
    depth: int
    block_size: int
    gradients: int
    batch: int
    sparsity: float
    damp: float
    repeats: int
    sharded: bool = False

    @property
    def unit(self) -> int:
        """Bytes of the weights that FSDP2 makes whole at once."""
        return 4 * 12 * self.width**2


def watch(meter: Meter) -> None:
    """Let the package report to ``meter``, in a process that does nothing else."""
    ranks = distributed.world_size()

    def count(name: str, size: Callable[[Any], float]) -> None:
        call = getattr(distributed, name)

        def counted(value: Any, *args: Any) -> Any:
            meter.send(size(value) if ranks > 1 else 0)
            return call(value, *args)

        setattr(distributed, name, counted)

    count("exchange", lambda parts: sum(p.nbytes for r, p in enumerate(parts) if r != distributed.rank()))
    count("gather_tensors", lambda tensor: tensor.nbytes * (ranks - 1))
    count("gather_objects", lambda value: len(pickle.dumps(value)) * (ranks - 1))
    count("sum_over_ranks", lambda tensor: 2 * tensor.nbytes * (ranks - 1) / ranks)
    for owner, name, phase in HOOKS:
        setattr(owner, name, meter.wrap(phase, getattr(owner, name)))


class Source:
    """The collector's rows, metered."""

    def __init__(self, collector: Any, meter: Meter) -> None:
        self._collector, self._meter = collector, meter
        self.memory = collector.memory
        if hasattr(collector, "hand_to_owners"):
            self.hand_to_owners = collector.hand_to_owners

    def __iter__(self) -> Iterator[Any]:
        return self._meter.items("collect", self._collector)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def own_batches(settings: Settings) -> list[tuple[Tensor, Tensor]]:
    """Batch ``j·R + r`` of all for rank ``r``; what the samples are does not depend on ``R`` or the size of a batch."""
    key = torch.Generator().manual_seed(0)
    count = -(-settings.gradients // settings.batch)
    images = torch.randn(count * settings.batch, 3, 16, 16, generator=key)
    labels = torch.randint(10, (len(images),), generator=key)
    batches = list(zip(images.split(settings.batch), labels.split(settings.batch), strict=True))
    return batches[distributed.rank() :: distributed.world_size()]


def make_model(settings: Settings) -> nn.Module:
    torch.manual_seed(0)
    shape = {"embed_dim": settings.width, "depth": settings.depth, "num_heads": 4}
    model = VisionTransformer(16, 4, 3, 10, global_pool="avg", **shape).eval()
    if settings.sharded:
        mesh = init_device_mesh("cpu", (distributed.world_size(),))
        for unit in (*model.blocks, model):
            fully_shard(unit, mesh=mesh)
    return model


def prune(meter: Meter, settings: Settings) -> tuple[Any, dict[str, Any]]:
    """One event; the result, and what this rank did for it."""
    model = make_model(settings)
    targets = Targets.from_model(model)
    batches = own_batches(settings)
    collector = GradientSamples(settings.gradients).collector(model, targets, loss, batches)
    collector.probe(batches[0])
    pruner = CAP(block_size=settings.block_size, num_gradients=settings.gradients, damp=settings.damp)
    meter.start()
    with meter.phase("rest"):
        with pruner.path(targets, Source(collector, meter)) as path:
            result = path.at(settings.sparsity)
        if not settings.sharded:
            distributed.check_equal_on_all_ranks({"the weights": result.weights, "the masks": result.masks})
    plan, blocks = path.plan, len(path.plan.groups[0])
    facts = {name: dict(getattr(meter, name)) for name in ("wall", "cpu", "sent", "peak")}
    facts["fisher"] = fisher_bytes(blocks, settings.block_size, pruner.storage, plan.storage_device)
    facts.update(
        blocks=blocks, planned=plan.peak_bytes, passes=plan.passes, blocks_float64=path.stats["blocks_float64"]
    )
    return result, {**facts, "weights": targets.numel}


def worker(rank: int, ranks: int, settings: Settings, folder: str) -> None:
    """One process; writes what it measured into ``folder``."""
    torch.set_num_threads(1)
    if ranks > 1 or settings.sharded:
        dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=ranks)
    meter = Meter(PHASES)
    watch(meter)
    small = replace(settings, width=16, depth=1, gradients=4 * ranks, batch=2, sparsity=0.5)
    prune(meter, small)  # compiles and connects
    runs = []
    for _ in range(settings.repeats):
        if ranks > 1:
            dist.barrier()
        result, facts = prune(meter, settings)
        runs.append(facts)
    Path(folder, f"{ranks}-{rank}.json").write_text(json.dumps(runs))
    with meter.phase("rest"):  # after the last run, so that it counts nowhere
        weights, masks = (
            {name: whole(tensor) for name, tensor in some.items()} for some in (result.weights, result.masks)
        )
    if rank == 0:
        torch.save((weights, masks), Path(folder, result_file(ranks, settings)))
    if dist.is_initialized():
        dist.destroy_process_group()


def result_file(ranks: int, settings: Settings) -> str:
    return f"{ranks}-sharded.pt" if settings.sharded else f"{ranks}.pt"


def start(ranks: int, settings: Settings, folder: Path, **variables: str) -> list[list[dict[str, Any]]]:
    """What each rank reports of each repeat."""
    with patch.dict(os.environ, {"OMP_NUM_THREADS": "1", **variables}):
        mp.spawn(worker, (ranks, settings, str(folder)), nprocs=ranks)
    (folder / "meeting").unlink(missing_ok=True)
    return [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


def measure(ranks: int, settings: Settings, folder: Path) -> dict[str, Any]:
    """The fastest of the repeats; of all ranks the largest."""
    load = os.getloadavg()[0]
    repeats = zip(*start(ranks, settings, folder), strict=True)
    timed = min(repeats, key=lambda every: max(sum(one["wall"].values()) for one in every))
    # memory in a run of its own, in which tensors go back to the system when they are freed (that takes time), and there from
    # the second event, since the first also loads code
    tidy = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}
    weighed = [events[-1] for events in start(ranks, replace(settings, repeats=2), folder, **tidy)]
    out: dict[str, Any] = {"ranks": ranks, "sharded": settings.sharded, "load_before": round(load, 2)}
    out.update({key: weighed[0][key] for key in ("weights", "passes", "blocks_float64")})
    for key in ("fisher", "planned", "blocks"):
        out[key] = max(one[key] for one in weighed)
    for key in ("wall", "cpu", "sent"):
        out[key] = {phase: max(one[key][phase] for one in timed) for phase in PHASES}
        out[key]["all"] = max(sum(one[key].values()) for one in timed)
    out["peak"] = {phase: max(one["peak"][phase] for one in weighed) for phase in PHASES}
    out["peak"]["all"] = max(out["peak"].values())
    out.update(differences(folder, result_file(ranks, settings), result_file(1, settings)))
    if settings.sharded:
        out["from_whole"] = differences(
            folder, result_file(1, settings), result_file(1, replace(settings, sharded=False))
        )
    return out


def differences(folder: Path, found: str, wanted: str) -> dict[str, float]:
    """How far two results are apart."""
    (weights, masks), (base, base_masks) = (torch.load(folder / name) for name in (found, wanted))
    flat, base_flat = (torch.cat([w.flatten() for w in some.values()]).double() for some in (weights, base))
    return {
        "masks_that_differ": sum(int((mask != base_masks[name]).sum()) for name, mask in masks.items()),
        "relative_difference": float((flat - base_flat).norm() / base_flat.norm()),
    }


def measured_tables(runs: Sequence[dict[str, Any]], unit_bytes: int = 0) -> list[str]:
    """Clock, CPU and memory of each phase, and as ratios to one rank; of a sharded model what the memory is to be, too."""
    tables = []
    kinds = {"wall": ("seconds", 1, 2), "cpu": ("CPU seconds", 1, 2), "peak": ("peak extra memory, MiB", MIB, 0)}
    for key, (title, unit, digits) in kinds.items():
        head = [
            f"{title}, a rank",
            *(f"R = {run['ranks']}" for run in runs),
            *(f"{run['ranks']} : 1" for run in runs[1:]),
        ]
        rows = []
        for phase, name in {**PHASES, "all": "**the whole event**"}.items():
            values = [run[key][phase] for run in runs]
            small = phase in NEW or values[0] < runs[0][key]["all"] / 100
            ratios = ["" if small else f"{value / values[0]:.2f}" for value in values[1:]]
            rows.append([name, *(f"{value / unit:.{digits}f}" for value in values), *ratios])
        if key == "peak" and unit_bytes:
            allowed = [1.15 * runs[0][key]["all"] / run["ranks"] + unit_bytes for run in runs]
            rows.append(["1.15/R of one rank's, and a unit", *(f"{value / unit:.{digits}f}" for value in allowed)])
            rows[-1] += [""] * (len(runs) - 1)
        tables.append(grid(head, rows))
    return tables


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="1 and at least one more")
    parser.add_argument("--width", type=int, default=96, help="of the ViT, which has 4 blocks: 48 width² weights")
    parser.add_argument("--gradients", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8, help="gradients that a rank computes between two exchanges")
    parser.add_argument("--block-size", type=int, default=192)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--damp", type=float, default=1e-6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/scaling.json")
    add_assumptions(parser)
    options = parser.parse_args(argv)
    options.ranks = sorted(set(options.ranks))
    if options.ranks[0] != 1 or len(options.ranks) < 2:
        parser.error("--ranks: give 1, which all else is compared with, and more")
    return options


def notes(runs: Sequence[dict[str, Any]], settings: Settings) -> str:
    """What was pruned, whether the results agree, and how far the clock can be trusted."""
    first, cores, most = runs[0], os.cpu_count() or 1, runs[-1]["ranks"]
    text = (
        f"{first['weights']:,} weights in {first['blocks']:,} blocks of {settings.block_size}; {settings.gradients} gradients in "
        f"batches of {settings.batch}; damp {settings.damp:g} ({first['blocks_float64']:g} blocks in float64); sparsity "
        f"{settings.sparsity:g}; one thread a rank; the fastest of {settings.repeats} events."
    )
    for run in runs[1:]:
        text += (
            f" Against one rank, {run['ranks']} ranks give {run['masks_that_differ']} mask entries that differ and weights "
            f"{run['relative_difference']:.1e} away (relative norm)."
        )
    if settings.sharded:
        whole = first["from_whole"]
        text = (
            f"With fully_shard, a unit for each block of the ViT ({settings.unit / MIB:.2f} MiB). {text} What FSDP2 itself "
            "sends, the weights, is part of forward and backward. One rank's rows come one by one from autograd and those of a "
            "model that is not sharded several at once from vmap, which rounds otherwise: "
            f"{whole['masks_that_differ']} mask entries differ, and weights are {whole['relative_difference']:.1e} away."
        )
    if most > cores:
        text += (
            f" The machine has {cores} cores, on which more ranks take turns: {most} ranks cannot be faster than {cores} by the "
            "clock, and wait for each other. What each has to do shows in its CPU seconds. Those of the exchange are gloo's, which "
            "copies the rows through the kernel."
        )
    return text


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = parse(argv)
    settings = Settings(
        options.width,
        4,
        options.block_size,
        options.gradients,
        options.batch,
        options.sparsity,
        options.damp,
        options.repeats,
    )
    if options.quick:
        settings = replace(settings, width=16, depth=1, block_size=16, gradients=64, batch=2, repeats=1)
    sharded = replace(settings, batch=2, sharded=True)  # as `CalibrationBatches` makes them of sharded targets
    with tempfile.TemporaryDirectory() as folder:
        runs = [measure(ranks, settings, Path(folder)) for ranks in options.ranks]
        sharded_runs = [measure(ranks, sharded, Path(folder)) for ranks in options.ranks]
    sizes = settings.gradients, settings.block_size, settings.batch, settings.sparsity
    checks = check(Problem(runs[0]["weights"], *sizes, packed=True, device="cpu"), runs)
    assumed, on_paper, tables = gpu_tables(options)
    out = {
        "machine": {**machine(), "threads": 1},
        "settings": asdict(settings),
        "runs": runs,
        "sharded_runs": sharded_runs,
        "check": checks,
        "assumed": assumed,
        "on_paper": on_paper,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(out, indent=2) + "\n")
    shards = [notes(sharded_runs, sharded), *measured_tables(sharded_runs, sharded.unit)]
    print("\n\n".join([notes(runs, settings), *measured_tables(runs), CHECKED, check_table(checks), *shards, *tables]))
    return out


if __name__ == "__main__":
    main()
