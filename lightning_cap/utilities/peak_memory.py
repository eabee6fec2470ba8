"""The most memory that tensors took while something ran."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cap.utilities.memory import release_memory

T = TypeVar("T")

_UNSEEN = 1.1
_PROCESS = Path("/proc/self")


def measure_peak(work: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """Call ``work``; what it gives, and the most bytes on ``device`` beyond those before.

    On CUDA the allocator tells (its peak begins anew). Elsewhere the storages of all tensors are counted that operators give,
    backward passes and `torch.func` included. A tenth is added for what operators take for themselves.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        return result, torch.cuda.max_memory_allocated(device) - before
    with _Storages() as storages:
        result = work()
    return result, int(_UNSEEN * storages.peak)


def watch_peak(device: torch.device) -> Callable[[], int | None]:
    """Measure from now on the most memory that is taken on a device beyond that of now. It takes no time worth mentioning.

    On CUDA torch's allocator tells, whose peak begins anew; memory that libraries take beside it is not seen, nor is what
    came before where `measure_peak` is called on the way. On the CPU it is the resident memory of this process alone, whose
    peak Linux begins anew too, so that ``ru_maxrss`` forgets an earlier one. Libraries, the interpreter and other threads
    are in it. What was freed before but kept by the allocator is given back first, else it would be taken again unseen; where
    that cannot be done (another C library than glibc), or a library keeps a pool of its own, too little is measured.

    Returns:
        Gives the bytes; None on other devices and systems, or where the system does not let the peak begin anew.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: max(0, torch.cuda.max_memory_allocated(device) - before)
    if device.type != "cpu" or not (_PROCESS / "clear_refs").exists():
        return lambda: None
    release_memory(device)
    try:
        (_PROCESS / "clear_refs").write_text("5")
        resident = _resident("VmRSS")
    except OSError:  # a container that does not let it
        return lambda: None
    return lambda: max(0, _resident("VmHWM") - resident)


def _resident(name: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class _Storages(TorchDispatchMode):
    """Counts the bytes of the storages that come into being, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._bytes: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._note((args, kwargs), new=False)
        result = func(*args, **kwargs)
        self._note(result, new=True)
        return result

    def _note(self, values: Any, new: bool) -> None:
        for value in pytree.tree_leaves(values):
            if not isinstance(value, Tensor) or value.layout != torch.strided:
                continue
            storage = value.untyped_storage()
            if id(storage) not in self._bytes:
                self._bytes[id(storage)] = storage.nbytes() if new else 0
                self._now += self._bytes[id(storage)]
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._forget, id(storage))

    def _forget(self, key: int) -> None:
        self._now -= self._bytes.pop(key)
