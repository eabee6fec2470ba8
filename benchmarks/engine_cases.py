"""One made-up pruning event, by our engine or by the published procedure: timed by phase, and its memory watched.

``engine.py`` runs this file in a process of its own for every event, so that none finds what another has left:

    python benchmarks/engine_cases.py '{"engine": "published", "kind": "well", "weights": 442368, "block_size": 192}'
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import published
import torch
from torch import Tensor

from lightning_cap.pruners import CAP
from lightning_cap.sparsity.targets import Targets

SPARSITIES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
ROWS_AT_ONCE = 16
_RANK = 64  # of the gradients of kind "ill", beside noise
_WIDTH = 384  # of the made-up layer


@dataclass(frozen=True)
class Case:
    """An event.

    Attributes:
        engine: Whose.
        kind: ``"well"``: blocks with a condition number of some hundreds, safe in float32. ``"ill"``: gradients of low rank and a
            damp far below them, a condition number beyond 10^6, so every block needs float64.
        weights: ``d``, a multiple of the block size and of 384.
        options: Further arguments of `CAP`.
    """

    engine: Literal["published", "ours"]
    kind: Literal["well", "ill"]
    weights: int
    block_size: int
    num_gradients: int = 512
    threads: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        return self.weights // self.block_size

    @property
    def damp(self) -> float:
        return 1e-7 if self.kind == "well" else 1e-8


def make_pruner(block_size: int, num_gradients: int, damp: float, **options: Any) -> CAP:
    """Where the arguments of the engine (``backend``, ``storage``, ``row_chunk``, ``max_memory``) reach the pruner."""
    return CAP(block_size=block_size, num_gradients=num_gradients, damp=damp, shrinkage=0.0, **options)


class Rows:
    """Gradients made on the fly, the same at every reading, in one buffer; tells how long it took itself.

    Attributes:
        seconds: Spent in making rows.
        ended: When the last row had been taken.
    """

    def __init__(self, case: Case) -> None:
        self._case = case
        self._buffer = torch.zeros(ROWS_AT_ONCE, case.num_blocks, case.block_size)
        self._low = torch.zeros(ROWS_AT_ONCE, case.num_blocks, _RANK if case.kind == "ill" else 0)
        generator = torch.Generator().manual_seed(1)
        self._basis = torch.randn(_RANK, case.block_size, generator=generator) / _RANK**0.5
        self._product = torch.zeros(ROWS_AT_ONCE * case.num_blocks, case.block_size if case.kind == "ill" else 0)
        self.seconds, self.ended = 0.0, 0.0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Chunks ``{"weight": (n, d / 384, 384)}``; a chunk holds until the next is asked for."""
        generator = torch.Generator().manual_seed(2)
        for first in range(0, self._case.num_gradients, ROWS_AT_ONCE):
            started = time.perf_counter()
            chunk = self._buffer[: min(ROWS_AT_ONCE, self._case.num_gradients - first)]
            self._make(chunk, generator)
            self.seconds += time.perf_counter() - started
            yield {"weight": chunk.view(len(chunk), -1, _WIDTH)}
        self.ended = time.perf_counter()

    def _make(self, chunk: Tensor, generator: torch.Generator) -> None:
        chunk.normal_(generator=generator)
        if self._case.kind == "well":
            chunk[..., 1::2].add_(chunk[..., ::2], alpha=0.5)
            chunk.mul_(0.01)
            return
        low = self._low[: len(chunk)].normal_(generator=generator)
        product = torch.mm(low.view(-1, _RANK), self._basis, out=self._product[: len(chunk) * self._case.num_blocks])
        chunk.mul_(1e-3).add_(product.view(chunk.shape)).mul_(0.01)

    def one_by_one(self) -> Iterator[Tensor]:
        """The same rows, each ``(K, B)``."""
        for chunk in self:
            yield from chunk["weight"].view(-1, self._case.num_blocks, self._case.block_size)


@dataclass
class Event:
    """What an event gave: the weights ``(K, B)`` at each sparsity, and seconds by phase without those of the source."""

    weights: list[Tensor]
    seconds: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)


def run_published(case: Case, weights: Tensor, rows: Rows) -> Event:
    """Accumulate, eliminate, select, as published."""
    started, source = time.perf_counter(), rows.seconds
    shape = (case.num_blocks, case.block_size)
    inverse = published.accumulate(rows.one_by_one(), *shape, case.num_gradients, case.damp)
    accumulated, source = time.perf_counter(), rows.seconds - source
    traces = published.eliminate(inverse, weights.clone())
    eliminated = time.perf_counter()
    results = published.select(traces, SPARSITIES)
    ended = time.perf_counter()
    marks = (accumulated - started - source, eliminated - accumulated, ended - eliminated)
    return Event(results, dict(zip(("accumulate", "solve", "results"), marks, strict=True)))


def run_ours(case: Case, weights: Tensor, rows: Rows) -> Event:
    """Accumulate, factor and eliminate, then cut and reconstruct at every sparsity."""
    targets = Targets({"weight": weights.view(-1, _WIDTH)})
    pruner = make_pruner(case.block_size, case.num_gradients, case.damp, **case.options)
    started, source = time.perf_counter(), rows.seconds
    with pruner.path(targets, rows) as path:
        accumulated, eliminated, source = rows.ended, time.perf_counter(), rows.seconds - source
        results = [path.at(sparsity) for sparsity in SPARSITIES]
        ended = time.perf_counter()
    marks = (accumulated - started - source, eliminated - accumulated, ended - eliminated)
    facts = {name: results[0].stats[name] for name in ("blocks_float64", "blocks_damping_increased")}
    facts.update(planned_bytes=path.plan.peak_bytes, row_chunk=pruner.row_chunk)
    facts.update(blocks=case.num_blocks, rows=case.num_gradients)
    found = [result.weights["weight"].view(weights.shape) for result in results]
    return Event(found, dict(zip(("accumulate", "solve", "results"), marks, strict=True)), facts)


def run(case: Case) -> dict[str, Any]:
    """Warm up, then run one event, watch its memory and judge its results."""
    torch.set_num_threads(case.threads)
    engine = {"published": run_published, "ours": run_ours}[case.engine]
    small = replace(case, weights=8 * math.lcm(case.block_size, _WIDTH), num_gradients=4 * ROWS_AT_ONCE)
    engine(small, make_weights(small), Rows(small))  # compiles, loads libraries, starts threads
    weights, rows = make_weights(case), Rows(case)
    for _ in zip(rows, range(1), strict=False):
        pass
    events: list[Event] = []
    peak = peak_bytes(lambda: events.append(engine(case, weights, rows)))
    event = events[0]
    return {
        "seconds": sum(event.seconds.values()),
        "phases": event.seconds,
        "peak_bytes": peak,
        "loss": quadratic_loss(case, weights, event.weights, rows),
        "zeros": [float((found == 0).float().mean()) for found in event.weights],
        "kept": [moments(found) for found in event.weights],
        **event.facts,
    }


def make_weights(case: Case) -> Tensor:
    """``(K, B)``, all different from zero."""
    return torch.randn(case.num_blocks, case.block_size, generator=torch.Generator().manual_seed(3)) * 0.05


def moments(found: Tensor) -> list[float]:
    """``Σ s²`` and ``Σ s³`` over the blocks' kept weights ``s``, for the arithmetic of reconstruction."""
    kept = (found != 0).sum(-1).double()
    return [float((kept**2).sum()), float((kept**3).sum())]


def quadratic_loss(case: Case, weights: Tensor, found: list[Tensor], rows: Rows) -> list[float | None]:
    """The loss increase ``½ δᵀ F δ`` of each result ``w + δ``, without forming ``F``; None if it is not finite."""
    change = torch.stack(found) - weights
    loss = case.damp * change.double().square().sum((1, 2)) / 2
    for row in rows.one_by_one():
        loss += torch.einsum("kb,skb->sk", row, change).double().square().sum(1) / (2 * case.num_gradients)
    return [float(value) if bool(value.isfinite()) else None for value in loss]


def peak_bytes(work: Callable[[], object]) -> int | None:
    """Most resident memory while ``work`` runs, over what was resident before; None where Linux does not tell."""
    gc.collect()
    _give_back_free_memory()
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        work()
        return None
    reset.write_text("5")  # the high-water mark starts again from what is resident now
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def _give_back_free_memory() -> None:
    """What earlier work has freed would else be used again without being counted."""
    library = ctypes.util.find_library("c")
    if library is not None and hasattr(ctypes.CDLL(library), "malloc_trim"):
        ctypes.CDLL(library).malloc_trim(0)


if __name__ == "__main__":
    print(json.dumps(run(Case(**json.loads(sys.argv[1])))))
