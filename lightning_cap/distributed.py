"""Process-group helpers over `torch.distributed`; no-ops in a single process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_cap.errors import CAPError


def world_size() -> int:
    """Processes in the run, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process, 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every rank, in order of rank. Small plain Python values only."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_tensors(tensor: Tensor) -> list[Tensor]:
    """A tensor of the same shape from every rank, in order of rank."""
    if world_size() == 1:
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Element-wise sum over ranks."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> None:
    """Overwrite ``tensor`` on every rank with rank 0's (bool by way of uint8)."""
    if world_size() == 1:
        return
    carrier = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
    dist.broadcast(carrier, src=0)
    tensor.copy_(carrier)


@contextmanager
def agreed(what: str) -> Iterator[None]:
    """Run the body on every rank; if it raises on one, every rank raises, so that none is left waiting.

    The body must not communicate. A rank that did not fail itself raises `CAPError` with the others' messages.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        if world_size() == 1:
            raise
        error = caught
    messages = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [f"rank {r}: {message}" for r, message in enumerate(messages) if message is not None]
    if failed:
        raise CAPError(f"{what} failed on another process; {'; '.join(failed)}")
