"""CPU seconds of a whole pruning event by phase, on a timm model with random weights and noise as images.

``engine.py`` runs this file in a process of its own for each model:

    python benchmarks/engine_share.py '{"model": "vit_tiny_patch16_224", "num_gradients": 128, "threads": 2}'

What counts is the time of all threads on a core, not the time that passes: other programs on the machine change it little.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import timm
import torch
import torch.nn.functional as F
from engine_cases import make_pruner, peak_bytes
from torch import Tensor, nn

from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.calibration.rows import RowComputer
from lightning_cap.calibration.sources import SourceMemory
from lightning_cap.sparsity.targets import Targets

T = TypeVar("T")

BATCH = 64
SPARSITY = 0.5


@dataclass(frozen=True)
class ShareCase:
    """An event on a model.

    Attributes:
        model: Name in timm.
        damp: Of the Fisher.
        model_options: Further arguments of timm.
        options: Further arguments of `CAP`.
    """

    model: str
    num_gradients: int = 128
    block_size: int = 192
    damp: float = 1e-6
    threads: int = 2
    model_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class Clock:
    """CPU seconds of all threads of this process, by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, phase: str, work: Callable[[], T]) -> T:
        """Call ``work`` and add its seconds to a phase."""
        started = time.process_time()
        try:
            return work()
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.process_time() - started


class TimedComputer(RowComputer):
    """Times forward and backward passes.

    Args:
        clock: Gets ``"gradients"``.
    """

    def __init__(self, clock: Clock, *given: Any) -> None:
        super().__init__(*given)
        self._clock = clock

    def one(self, batch: Any) -> dict[str, Tensor]:
        """As the base."""
        return self._clock.time("gradients", lambda: super(TimedComputer, self).one(batch))

    def at_once(self, batch: Any) -> dict[str, Tensor]:
        """As the base."""
        return self._clock.time("gradients", lambda: super(TimedComputer, self).at_once(batch))


class TimedRows:
    """Passes gradient rows on.

    Args:
        source: Its rows.
        clock: Gets ``"collect"``, which the gradients are a part of, and ``"reading"``, the whole pass, its reader included.
    """

    def __init__(self, source: GradientCollector, clock: Clock) -> None:
        self._source, self._clock = source, clock

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        started, rows = time.process_time(), iter(self._source)
        while True:
            chunk = self._clock.time("collect", lambda: next(rows, None))
            if chunk is None:
                break
            yield chunk
            del chunk
        self._clock.seconds["reading"] = self._clock.seconds.get("reading", 0.0) + time.process_time() - started

    def memory(self) -> SourceMemory:
        """As the source says."""
        return self._source.memory()

    def limit_rows(self, rows: int) -> None:
        """Tell the source."""
        self._source.limit_rows(rows)


def run(case: ShareCase) -> dict[str, Any]:
    """One event, from the plan to the weights in the model, after a small one that compiles what it needs.

    The gradients tried to plan it are not counted: a run tries them once, before its first event.
    """
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    model = timm.create_model(case.model, pretrained=False, **case.model_options).eval()
    size = case.model_options.get("img_size", 224)
    _warm_up(case)
    clock, targets = Clock(), Targets.from_model(model)
    computer = TimedComputer(clock, model, targets, _loss, 1, nullcontext, 1.0)
    source = GradientCollector(
        model, targets, _loss, list(_batches(case.num_gradients, size)), case.num_gradients, computer=computer
    )
    source.memory()
    clock.seconds.clear()
    pruner = make_pruner(case.block_size, case.num_gradients, case.damp, **case.options)
    facts: dict[str, Any] = {}

    def work() -> None:
        with clock.time("path", lambda: pruner.path(targets, TimedRows(source, clock))) as path:
            result = clock.time("results", lambda: path.at(SPARSITY))
            facts.update(planned_bytes=path.plan.peak_bytes, rows_at_once=path.plan.rows, row_chunk=pruner.row_chunk)
        clock.time("results", lambda: result.apply(targets))
        facts.update(
            sparsity=result.sparsity, blocks=result.stats["blocks"], blocks_float64=result.stats["blocks_float64"]
        )

    peak = peak_bytes(work)
    found = clock.seconds
    phases = {
        "gradients": found["gradients"],
        "collect besides": found["collect"] - found["gradients"],
        "accumulate": found["reading"] - found["collect"],
        "plan and solve": found["path"] - found["reading"],
        "results": found["results"],
    }
    total = sum(phases.values())
    share = phases["gradients"] / total
    return {
        "cpu_seconds": phases,
        "total": total,
        "share": share,
        "weights": targets.numel,
        "peak_bytes": peak,
        **facts,
    }


def _warm_up(case: ShareCase) -> None:
    targets = Targets({"weight": torch.randn(case.block_size, 8)})
    rows = torch.randn(64, case.block_size, 8, generator=torch.Generator().manual_seed(0))
    with make_pruner(case.block_size, 64, 1.0, **case.options).path(targets, [{"weight": rows}]) as path:
        path.at(SPARSITY)


def _batches(count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for first in range(0, count, BATCH):
        n = min(BATCH, count - first)
        yield torch.randn(n, 3, size, size, generator=generator), torch.randint(0, 1000, (n,), generator=generator)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


if __name__ == "__main__":
    print(json.dumps(run(ShareCase(**json.loads(sys.argv[1])))))
