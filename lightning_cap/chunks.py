"""Work on many blocks in chunks, which are halved when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


def in_chunks(items: Tensor, size: int, work: Callable[[Tensor], None]) -> None:
    """Call ``work(items[i : i + size])`` until all are done; when it runs out of memory, go on with half the size.

    ``work`` must be repeatable: it is called again for what it could not finish.

    Args:
        items: ``(n,)`` indices.
        size: Items in one call, at least 1.

    Raises:
        torch.OutOfMemoryError: One item alone is too large (or whatever the allocator raised).
    """
    done, size = 0, max(1, size)
    while done < len(items):
        if _fits(work, items[done : done + size], last=size == 1):
            done += size
        else:
            size //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            _log.warning("Out of memory in the solver; going on with chunks of %d blocks.", size)


def _fits(work: Callable[[Tensor], None], chunk: Tensor, last: bool) -> bool:
    try:
        work(chunk)
    except (RuntimeError, MemoryError) as error:
        if last or not is_out_of_memory(error):
            raise
        return False  # the frames that hold memory die with the exception, before the next try
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator gave up: CUDA's, torch's on the CPU, or Python's."""
    texts = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    )
