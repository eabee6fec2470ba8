"""Elimination alone, from given inverse Fisher blocks, on one thread: torch rank-1, torch left-looking, and the compiled loop.

``engine.py`` runs this file in a process of its own:

    python benchmarks/engine_elimination.py '{"block_size": 192, "num_blocks": 256, "steps": 144}'
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from limits import SECONDS
from published import rank1_elimination
from torch import Tensor

from lightning_cap.solver.torch_backend import eliminate_left_looking
from lightning_cap.sparsity.patterns import NofM, Pattern, Unstructured

CHUNKS = (16, 32, 64)  # blocks at a time, of which the fastest counts

#: ``(inverse, floor, weights)`` of some blocks -> their order of elimination ``(k, steps)``; may use its input up.
Work = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(block_size: int, num_blocks: int, steps: int, seconds: float = 4 * SECONDS) -> dict[str, Any]:
    """Blocks a second of each way, and the share of blocks in which they agree on the order with rank-1 in float64."""
    torch.set_num_threads(1)
    data = make_blocks(num_blocks, block_size)
    exact = rank1_elimination(data[0].double(), data[2].double(), steps, in_place=True)[0]
    ways: dict[str, Work] = {
        "rank-1, as published": lambda H, floor, w: rank1_elimination(H, w, steps)[0],
        "rank-1, in place": lambda H, floor, w: rank1_elimination(H, w, steps, in_place=True)[0],
        "torch left-looking": lambda H, floor, w: torch_left_looking(H, floor, w, steps),
        "numba": lambda H, floor, w: numba_loop(H, floor, w, steps),
        "numba, float64": lambda H, floor, w: numba_loop(H, floor, w, steps),
    }
    found: dict[str, Any] = {}
    for name, work in ways.items():
        given = tuple(t.double() for t in data) if "float64" in name else data
        rates = {chunk: rate(work, given, chunk, seconds / len(CHUNKS)) for chunk in CHUNKS if chunk <= num_blocks}
        best = max(rates, key=lambda chunk: rates[chunk])
        order = work(*(t.clone() for t in given))
        found[name] = {
            "blocks_s": rates[best], "chunk": best, "same_order": float((order == exact).all(-1).float().mean()),
        }  # fmt: skip
    return found


def make_blocks(num_blocks: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Well-conditioned inverses ``(K, B, B)``, the floors of their diagonals ``(K, B)``, and weights ``(K, B)``."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num_blocks, 3 * block_size, block_size, generator=generator)
    fisher = torch.bmm(rows.mT, rows) / rows.shape[1]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(fisher)).contiguous()  # it comes column by column
    floor = fisher.diagonal(dim1=1, dim2=2).reciprocal()
    return inverse, floor, torch.randn(num_blocks, block_size, generator=generator)


def rate(work: Work, data: tuple[Tensor, ...], chunk: int, seconds: float) -> float:
    """Blocks a second, ``chunk`` at a time, without making the copies that are used up; the best chunk counts."""
    best, end, first, runs = float("inf"), time.perf_counter() + seconds, 0, 0
    while runs < 3 or time.perf_counter() < end:
        given = tuple(t[first : first + chunk].clone() for t in data)
        started = time.perf_counter()
        work(*given)
        if runs:  # the first one warms up
            best = min(best, (time.perf_counter() - started) / len(given[0]))
        first, runs = (first + chunk) % (len(data[0]) // chunk * chunk), runs + 1
    return 1 / best


def torch_left_looking(inverse: Tensor, floor: Tensor, weights: Tensor, steps: int) -> Tensor:
    B = weights.shape[1]
    pattern: Pattern = (
        Unstructured() if steps == B else NofM(B - steps, B)
    )  # the whole block one group: ends after the steps
    rank, _ = eliminate_left_looking(inverse, floor, weights, torch.ones_like(weights, dtype=torch.bool), pattern)
    return rank.argsort(-1)[:, :steps]


@functools.cache
def _loop() -> Any:
    """The elimination that `solve_blocks` of `lightning_cap.kernels.cpu.obs` calls for each block, without the factorisation."""
    from numba import njit

    from lightning_cap.kernels.cpu import obs as blocks
    from lightning_cap.kernels.cpu.tile import matrix

    eliminate = blocks._eliminate

    @njit(nogil=True)
    def loop(inverse: Any, floors: Any, weights: Any, kind: Any, keep: int, rank: Any) -> None:
        B = inverse.shape[1]
        A, U, panel, work = matrix(B, B, kind), matrix(B, B, kind), matrix(4, B, kind), matrix(6, B, kind)
        w, root, c, losses = work[4], work[5], np.zeros((B, 1), kind.dtype), np.zeros(B, kind.dtype)
        where, groups, counts = np.zeros(B, np.int64), np.zeros(B, np.int64), np.zeros(1, np.int64)
        for b in range(inverse.shape[0]):
            for i in range(B):
                root[i] = 1 / np.sqrt(floors[b, i])  # blocks are solved scaled to a diagonal of one
                w[i] = weights[b, i] * root[i]
                for j in range(i + 1):
                    A[i, j] = inverse[b, i, j] * root[i] * root[j]
            counts[0] = B
            eliminate(A, U, B, w, where, groups, counts, keep, panel, c, work, rank[b], losses)

    return loop


def numba_loop(inverse: Tensor, floor: Tensor, weights: Tensor, steps: int) -> Tensor:
    B = weights.shape[1]
    rank = torch.full(weights.shape, B, dtype=torch.int64)
    kind = torch.empty(1, dtype=weights.dtype).numpy()
    _loop()(inverse.numpy(), floor.numpy(), weights.numpy(), kind, B - steps, rank.numpy())
    return rank.argsort(-1)[:, :steps]


def flops(block_size: int, steps: int) -> dict[str, int]:
    """Multiply-adds, counted as two, of a block's elimination.

    ``needed``: every pivot row formed over the weights that are left, ``2·t·(B - t)`` in step ``t``, which is what the compiled
    loop does; ``full rows``: over all ``B``, as torch does; ``rank-1``: whole matrices.
    """
    B, K = block_size, steps
    return {
        "needed": sum(2 * t * (B - t) for t in range(K)),
        "full rows": sum(2 * t * B for t in range(K)),
        "rank-1": 2 * K * B * B,
    }


if __name__ == "__main__":
    print(json.dumps(run(**json.loads(sys.argv[1]))))
