"""Process-group helpers over `torch.distributed`; no-ops in a single process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_cap.errors import CAPError
from lightning_cap.utilities.bits import pack_bits, unpack_bits
from lightning_cap.utilities.stopping import StopRequested, poll

#: What this process is in the middle of, in the body of `fail_together`.
_task: ContextVar[str | None] = ContextVar("task", default=None)

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    _hear_of_failures()
    return _gather_objects(value)


def _gather_objects(value: Any) -> list[Any]:
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_tensors(tensor: Tensor) -> list[Tensor]:
    """A tensor of the same shape from every rank, in order of rank."""
    if world_size() == 1:
        return [tensor]
    _hear_of_failures()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Element-wise sum over ranks."""
    if world_size() > 1:
        _hear_of_failures()
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather_counts(value: int, device: torch.device) -> list[int]:
    """A whole number from every rank, in order of rank, by tensors alone."""
    return [int(part) for part in torch.stack(gather_tensors(torch.tensor(value, device=device))).tolist()]


def exchange(parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """All-to-all: ``parts[r]`` goes to rank ``r``; what the ranks sent here is returned flat, in order of rank.

    Args:
        parts: Tensors of one dtype on one device, one for each rank.
        sizes: Numbers of elements that come from each rank.
    """
    if world_size() == 1:
        return [parts[0].reshape(-1)]
    _hear_of_failures()
    sent = torch.cat([part.reshape(-1) for part in parts])
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts])
    return list(received.split(sizes))


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """``(counts[r], B)`` of every rank ``r``, one after the other on all of them; bool is sent as bits."""
    if world_size() == 1:
        return rows
    carrier = pack_bits(rows) if rows.dtype == torch.bool else rows
    padded = carrier.new_zeros(max(counts), carrier.shape[1])
    padded[: len(carrier)] = carrier
    parts = torch.cat([part[:count] for part, count in zip(gather_tensors(padded), counts, strict=True)])
    return unpack_bits(parts, rows.shape[1]) if rows.dtype == torch.bool else parts


def check_equal_on_all_ranks(named: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Compare checksums of tensors between the ranks.

    Args:
        named: ``{what they are: {name: tensor}}``.

    Raises:
        CAPError: They are not the same, bit for bit, on all ranks (on every rank).
    """
    if world_size() == 1:
        return
    sums = {what: {name: _checksum(t) for name, t in tensors.items()} for what, tensors in named.items()}
    for r, other in enumerate(gather_objects(sums)):
        for what, own in sums.items():
            different = [name for name, value in own.items() if other[what].get(name) != value]
            if different:
                raise CAPError(
                    f"After the pruning event {what} of {len(different)} targets, first {different[0]!r}, differ between rank "
                    f"{rank()} and rank {r}. The processes ran apart before it: check that nothing changes weights on one rank "
                    "only, and that all run the same code and configuration."
                )


def _checksum(tensor: Tensor) -> int:
    """Of the bits and their places; equal tensors have equal ones."""
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_WHOLE[flat.element_size()]).long()
    places = torch.arange(len(bits), device=bits.device)
    return int(((bits + 0x9E3779B9) * (2 * places + 1)).sum())


def broadcast(tensor: Tensor) -> None:
    """Overwrite ``tensor`` on every rank with rank 0's (bool by way of uint8)."""
    if world_size() == 1:
        return
    _hear_of_failures()
    carrier = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
    dist.broadcast(carrier, src=0)
    tensor.copy_(carrier)


@contextmanager
def raise_on_all_ranks(what: str) -> Iterator[None]:
    """Run the body on every rank; if it raises on one, every rank raises, so that none is left waiting.

    The body must not communicate. A rank that did not fail itself raises `CAPError` with the others' messages, or `StopRequested`
    if nothing else has ended the others.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if world_size() == 1:
            raise
        error = caught
    messages = gather_objects(None if error is None else _message(error))
    if any(messages):
        raise _agreed(error, what, messages)


def poll_together() -> None:
    """`poll`, with one answer for all ranks, where they communicate before the next. Every rank must call it equally often.

    Raises:
        StopRequested: One of them was told to end; on all.
    """
    told: StopRequested | None = None
    try:
        poll()
    except StopRequested as caught:
        if world_size() == 1:
            raise
        told = caught
    if world_size() > 1 and _any_failed(told is not None):
        messages = _gather_objects(None if told is None else _message(told))
        raise _agreed(told, "The validation", messages)


@contextmanager
def fail_together(what: str) -> Iterator[None]:
    """The same for a body that communicates, by the functions of this file alone: each asks first whether another rank failed.

    So a rank that waits for one that failed raises `CAPError` with its message. Inside another such body this does nothing.
    """
    if world_size() == 1 or _task.get() is not None:
        yield
        return
    token = _task.set(what)
    try:
        yield
        _hear_of_failures()
    except _FailedElsewhereError as error:
        raise _agreed(None, what, error.messages) from None
    except Exception as error:
        _any_failed(True)
        agreed = _agreed(error, what, _gather_objects(_message(error)))
        if agreed is not error:
            raise agreed from error
        raise
    finally:
        _task.reset(token)


class _FailedElsewhereError(CAPError):
    """Raised where this process waited for another one that has failed; all know of it."""

    def __init__(self, messages: list[str | None]) -> None:
        super().__init__()
        self.messages = messages


def _hear_of_failures() -> None:
    """Inside `fail_together`, raise if another rank has failed. Every rank calls it equally often."""
    task = _task.get()
    if task is not None and _any_failed(False):
        raise _FailedElsewhereError(_gather_objects(None))


def _any_failed(failed: bool) -> bool:
    flag = torch.tensor(int(failed), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _agreed(error: Exception | None, what: str, messages: list[str | None]) -> Exception:
    """What this rank raises, of its own error and the messages of all: to be told to end is one thing on all ranks, or none."""
    failed = {r: message for r, message in enumerate(messages) if message is not None}
    stops = all(message.startswith(_STOPS) for message in failed.values())
    if error is not None and isinstance(error, StopRequested) == stops:
        return error
    if stops:
        return StopRequested(next(iter(failed.values())).removeprefix(_STOPS))
    return CAPError(f"{what} failed on another process; {'; '.join(f'rank {r}: {text}' for r, text in failed.items())}")


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


_STOPS = _message(StopRequested())
