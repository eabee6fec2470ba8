"""What ``engine.py`` measures on a GPU: the phases at the size of DeiT-Small, and whole events on timm models.

``engine.py`` runs this file in a process of its own for each:

    python benchmarks/engine_gpu.py '{"phases": {"num_rows": 4096, "depth": 12, "block_size": 192}}'
    python benchmarks/engine_gpu.py '{"event": {"model": "resnet18", "block_size": 64, "num_gradients": 64, "samples": 16}}'
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from engine_cases import SPARSITIES, make_pruner
from torch import Tensor, nn

from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.calibration.sources import SourceMemory, TimedSource
from lightning_cap.fisher.blocks import ROW_CHUNK, EmpiricalFisher
from lightning_cap.solver import eliminate
from lightning_cap.solver.linalg import restrict, spd_inverse
from lightning_cap.sparsity.patterns import Unstructured
from lightning_cap.sparsity.targets import Targets

DEIT_SMALL_BLOCK = {"qkv": (1152, 384), "proj": (384, 384), "fc1": (1536, 384), "fc2": (384, 1536)}
DEPTH = 12  # 21,233,664 weights
FACTOR_CHUNK = 2048  # blocks inverted at a time where only that is timed


@dataclass(frozen=True)
class ModelCase:
    """A whole event: model, block size, gradients of so many images each, and the cap on memory."""

    model: str
    block_size: int
    num_gradients: int
    samples: int
    max_memory: str | None = None


def model_cases(n: int, few: int) -> dict[str, ModelCase]:
    """Events by the name of their row, with ``n`` gradients, and with ``few`` for the large models."""
    small = "deit_small_patch16_224"
    return {
        "DeiT-Small, 16 images a gradient": ModelCase(small, 192, n, 16),
        "DeiT-Small, per sample": ModelCase(small, 192, n, 1),
        "DeiT-Base": ModelCase("deit_base_patch16_224", 192, few, 16),
        "DeiT-Base, 24 GB": ModelCase("deit_base_patch16_224", 192, few, 16, "24GB"),
        "ConvNeXt-L": ModelCase("convnext_large", 128, few, 16),
        "ConvNeXt-L, 24 GB": ModelCase("convnext_large", 128, few, 16, "24GB"),
    }


def phases(num_rows: int, depth: int, block_size: int, device: str = "cuda", **options: Any) -> dict[str, Any]:
    """Seconds to accumulate ``num_rows`` rows, to factor and to eliminate all blocks of ``depth`` DeiT-Small layers.

    Elimination is the solver's whole time less that of the same inversions alone.
    """
    shapes = {f"{i}.{name}": shape for i in range(depth) for name, shape in DEIT_SMALL_BLOCK.items()}
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    targets = Targets({name: normal(shape) * 0.05 for name, shape in shapes.items()})
    layout = targets.blocks(block_size)
    wanted = {key: options[key] for key in ("row_chunk", "storage") if key in options}
    fisher, add = EmpiricalFisher(layout, torch.device(device), **wanted), 0.0
    for _ in range(0, num_rows, 16):
        chunk = {name: normal(16, *shape) * 0.01 for name, shape in shapes.items()}
        add += seconds(partial(fisher.update, chunk), device)
    del chunk
    blocks = None

    def finish() -> None:
        nonlocal blocks
        blocks = fisher.finish()

    add += seconds(finish, device)
    weights, alive = layout.pack(targets.weights(), torch.float32), layout.valid(device)
    run = partial(eliminate, blocks, weights, alive, 1e-7, Unstructured(), backend=options.get("backend", "auto"))
    run()  # compiles
    solve = seconds(run, device)
    factor = seconds(partial(_factor, blocks, alive), device)
    return {
        "weights": targets.numel,
        "blocks": layout.num_blocks,
        "block_size": block_size,
        "rows": num_rows,
        "row_chunk": options.get("row_chunk", ROW_CHUNK),
        "seconds": {"accumulate": add, "factor": factor, "eliminate": solve - factor},
    }


def _factor(fisher: Any, alive: Tensor) -> None:
    for index in torch.arange(len(alive), device=alive.device).split(FACTOR_CHUNK):
        damp = torch.full((len(index),), 1e-7, dtype=torch.float64, device=alive.device)
        spd_inverse(restrict(fisher[index], alive[index], damp)[0])


def event(case: ModelCase, device: str = "cuda", **options: Any) -> dict[str, Any]:
    """One pruning event on a timm model with random weights and synthetic images, in bf16 autocast.

    ``gradients`` are the seconds of forward and backward passes, everything else is ours.
    """
    torch.manual_seed(0)
    model = timm.create_model(case.model, pretrained=False).to(device).eval()
    targets = Targets.from_model(model)
    collector = GradientCollector(
        model,
        targets,
        _loss,
        Images(case, device),
        case.num_gradients,
        case.samples,
        context=lambda: torch.autocast(device, dtype=torch.bfloat16),
    )
    if case.max_memory is not None:
        options = {**options, "max_memory": case.max_memory}
    pruner = make_pruner(case.block_size, case.num_gradients, 1e-8, **options)
    pruner.samples_per_gradient = case.samples
    collector.probe(next(iter(Images(case, device))))  # loads the libraries
    source = TimedSource(_Settled(collector, device))
    before = _reset_peak(device)
    facts: dict[str, Any] = {}

    def work() -> None:
        with pruner.path(targets, source) as path:
            result = path.at(SPARSITIES[-1])
            facts.update(
                passes=path.plan.passes,
                storage_device=str(path.plan.storage_device),
                planned_bytes=path.plan.peak_bytes,
            )
        facts.update(result.stats, sparsity=result.sparsity)

    total = seconds(work, device)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    return {
        "case": vars(case),
        "weights": targets.numel,
        "seconds": total,
        "gradients": source.seconds,
        "share_gradients": source.seconds / total,
        "peak_bytes": peak,
        **facts,
    }


class Images:
    """Batches of noise with random labels, the same at every reading; a batch is a whole number of gradient samples."""

    def __init__(self, case: ModelCase, device: str, batch: int = 64) -> None:
        self._count, self._device = case.num_gradients * case.samples, device
        self._batch = max(case.samples, batch // case.samples * case.samples)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator(self._device).manual_seed(1)
        for _ in range(0, self._count, self._batch):
            images = torch.randn(self._batch, 3, 224, 224, generator=generator, device=self._device)
            yield images, torch.randint(0, 1000, (self._batch,), generator=generator, device=self._device)


class _Settled:
    """Waits for the device before and after a chunk is made, so that the time of either side is its own."""

    def __init__(self, source: GradientCollector, device: str) -> None:
        self._source, self._device = source, device

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for chunk in self._source:
            _settle(self._device)
            yield chunk
            _settle(self._device)

    def memory(self) -> SourceMemory:
        return self._source.memory()

    def limit_rows(self, rows: int) -> None:
        self._source.limit_rows(rows)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time of ``work``, the device at rest before and after."""
    _settle(device)
    started = time.perf_counter()
    work()
    _settle(device)
    return time.perf_counter() - started


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> int:
    gc.collect()
    if device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no GPU is at hand: torch.cuda.is_available() is False")
    spec = json.loads(sys.argv[1])
    wanted = spec.get("options", {})
    print(
        json.dumps(
            phases(**spec["phases"], **wanted) if "phases" in spec else event(ModelCase(**spec["event"]), **wanted)
        )
    )
