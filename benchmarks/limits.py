"""What the machine could do at most, measured on the spot: multiply-adds a second and bytes a second.

    python benchmarks/limits.py

A phase that moves ``bytes`` and does ``flops`` cannot take less than the larger of the two quotients, so a fraction
of that limit says how much is left to gain. The limits are the best that was seen in a second of trying on a machine that
others may use too; what runs slower than that for a while cannot be told from what is slow.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

SECONDS = 0.5  # spent on one number
_CHAIN = 16  # dependent multiply-adds of an element between its load and its store
_STREAM_BYTES = 2**28  # beyond any cache
DTYPES = ("float32", "float64")


def limits(seconds: float = SECONDS) -> dict[str, Any]:
    """FMA peak in Gflop/s (a multiply-add counts two) and memory bandwidth in GB/s of the CPU, and of the GPU if there is one.

    ``gflops[dtype][threads]``, ``read_gb_s[threads]`` and ``copy_gb_s[threads]`` (bytes read and written) for one thread and for
    all that torch uses; ``gpu`` likewise without threads. ``seconds`` are spent on each number.
    """
    counts = sorted({1, torch.get_num_threads()})
    return {
        "gflops": {dtype: {str(n): _peak_gflops(dtype, n, seconds) for n in counts} for dtype in DTYPES},
        "read_gb_s": {str(n): _read_gb_s(n, seconds) for n in counts},
        "copy_gb_s": {str(n): _copy_gb_s(n, seconds) for n in counts},
        "gpu": _gpu_limits(seconds) if torch.cuda.is_available() else None,
    }


def _peak_gflops(dtype: str, threads: int, budget: float) -> float:
    """The better of a compiled loop of multiply-adds in registers and torch's matrix product."""
    return max(_fma_gflops(dtype, threads, budget / 2), _gemm_gflops(dtype, threads, budget / 2))


def _fma_gflops(dtype: str, threads: int, budget: float) -> float:
    kernel = _fma_kernel()
    arrays = [np.ones(256, dtype) for _ in range(threads)]  # at most 2 KiB: in the first-level cache
    rounds = 20_000
    factor, term = arrays[0].dtype.type(0.5), arrays[0].dtype.type(0.5)
    seconds = _on_threads(lambda i: kernel(arrays[i], factor, term, rounds), threads, budget)
    return 2 * _CHAIN * rounds * arrays[0].size * threads / seconds / 1e9


@functools.cache
def _fma_kernel() -> Any:
    """``a = a·x + y``, sixteen times over, on every element. Contraction only, so that nothing is computed away."""
    from numba import njit

    @njit(nogil=True, fastmath={"contract"})
    def four(v: Any, x: Any, y: Any) -> Any:
        v = v * x + y
        v = v * x + y
        v = v * x + y
        return v * x + y

    @njit(nogil=True, fastmath={"contract"})
    def kernel(a: Any, x: Any, y: Any, rounds: int) -> None:
        for _ in range(rounds):
            for i in range(a.shape[0]):
                a[i] = four(four(four(four(a[i], x, y), x, y), x, y), x, y)

    return kernel


def _gemm_gflops(dtype: str, threads: int, budget: float) -> float:
    n = 768
    a = torch.ones(n, n, dtype=getattr(torch, dtype))
    out = torch.empty_like(a)
    return 2 * n**3 / _with_torch_threads(lambda: torch.mm(a, a, out=out), threads, budget) / 1e9


def _read_gb_s(threads: int, budget: float) -> float:
    kernel = _sum_kernel()
    whole = np.ones(_STREAM_BYTES // 4, np.float32)
    parts = np.array_split(whole, threads)
    return whole.nbytes / _on_threads(lambda i: kernel(parts[i]), threads, budget) / 1e9


@functools.cache
def _sum_kernel() -> Any:
    from numba import njit

    @njit(nogil=True, fastmath=True)
    def kernel(a: Any) -> Any:
        total = a.dtype.type(0)
        for i in range(a.shape[0]):
            total += a[i]
        return total

    return kernel


def _copy_gb_s(threads: int, budget: float) -> float:
    source = torch.ones(_STREAM_BYTES // 4)
    target = torch.zeros_like(source)
    return 2 * _STREAM_BYTES / _with_torch_threads(lambda: target.copy_(source), threads, budget) / 1e9


def _on_threads(work: Callable[[int], Any], threads: int, budget: float) -> float:
    """Least seconds in which ``work(0) ... work(threads - 1)`` are done side by side."""
    with ThreadPoolExecutor(threads) as pool:
        return best_seconds(lambda: list(pool.map(work, range(threads))), budget)


def _with_torch_threads(work: Callable[[], Any], threads: int, budget: float) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return best_seconds(work, budget)
    finally:
        torch.set_num_threads(before)


def best_seconds(work: Callable[[], Any], budget: float) -> float:
    """Least seconds of a call, tried for about ``budget`` seconds and at least twice, after one that does not count."""
    work()
    best, runs, end = float("inf"), 0, time.perf_counter() + budget
    while runs < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        best, runs = min(best, time.perf_counter() - started), runs + 1
    return best


def _gpu_limits(budget: float) -> dict[str, Any]:
    """Matrix products without TF32, copies on the device and from pinned main memory."""
    n = 8192
    flops = {}
    for dtype in DTYPES:
        a = torch.ones(n, n, dtype=getattr(torch, dtype), device="cuda")
        out = torch.empty_like(a)
        flops[dtype] = (
            2 * n**3 / best_seconds(lambda a=a, out=out: _synchronised(lambda: torch.mm(a, a, out=out)), budget) / 1e9
        )
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = best_seconds(lambda: _synchronised(lambda: target.copy_(source)), budget)
    pinned = torch.empty(2**27, pin_memory=True)
    to_host = best_seconds(lambda: _synchronised(lambda: pinned.copy_(source[: 2**27], non_blocking=True)), budget)
    return {"gflops": flops, "copy_gb_s": 2 * 2**30 / copy / 1e9, "to_host_gb_s": 2**29 / to_host / 1e9}


def _synchronised(work: Callable[[], Any]) -> None:
    work()
    torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(limits(), indent=2))
