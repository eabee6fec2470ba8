"""Blocks shared out over threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def over_blocks(work: Callable[[int, int], None], count: int) -> None:
    """Call ``work(first, last)`` for pieces of ``range(count)`` on ``torch.get_num_threads()`` threads.

    ``work`` must let go of the interpreter lock, as the compiled kernels do. The threads are made anew each time, which
    takes microseconds: nothing is left behind that a fork could break or two callers could fight over (numba's own
    parallel loops abort after a fork with OpenMP, and are not thread-safe with the work queue).
    """
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        work(0, count)
        return
    size = -(-count // (4 * threads))
    starts = range(0, count, size)
    with ThreadPoolExecutor(threads) as pool:
        for job in [pool.submit(work, first, min(first + size, count)) for first in starts]:
            job.result()
