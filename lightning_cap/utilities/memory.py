"""Work on many blocks in chunks, which are halved when memory runs out."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import is_whole, shown
from lightning_cap.utilities.stopping import poll

_log = logging.getLogger(__name__)


def in_chunks(items: Tensor, size: int, work: Callable[[Tensor], None]) -> None:
    """Call ``work(items[i : i + size])`` until all are done; when it runs out of memory, go on with half the size.

    ``work`` must be repeatable: it is called again for what it could not finish.

    Args:
        items: ``(n,)`` indices.
        size: Items in one call, at least 1.

    Raises:
        torch.OutOfMemoryError: One item alone is too large (or whatever the allocator raised).
        StopRequested: See `poll`.
    """
    done, size = 0, max(1, size)
    while done < len(items):
        poll()
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


def release_memory(device: torch.device) -> None:
    """Give back to the system, or to other users of a GPU, what was freed: allocators keep it for themselves."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc alone has it
    if trim is not None:
        trim(0)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(value: int | str | None, argument: str) -> int | None:
    """``"20GB"``, ``"1.5 GiB"`` or a number of bytes -> bytes; None for None.

    Raises:
        ConfigError: It is not a positive amount of memory.
    """
    if value is None:
        return None
    given = str(value) if is_whole(value) or isinstance(value, str) else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", given.upper(), re.ASCII)
    size = int(Fraction(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size <= 0:
        raise ConfigError(f"{argument}={shown(value)}: give bytes, or an amount such as '20GB' or '1.5GiB'.")
    return size


def free_memory(device: torch.device) -> int | None:
    """Bytes free on ``device``, torch's own cached blocks included; None where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        known = [size for size in (_free_of_the_machine(), _free_of_the_container()) if size is not None]
        return min(known) if known else None
    return None


def _free_of_the_machine() -> int | None:
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        try:
            with open("/proc/meminfo") as lines:  # counts the page cache as free, which sysconf does not
                for line in lines:
                    if line.startswith("MemAvailable:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _free_of_the_container() -> int | None:
    """What a control group leaves, file cache not counted as used; None without a limit."""
    try:
        folder = Path("/sys/fs/cgroup")
        most = (folder / "memory.max").read_text().strip()
        if most == "max":
            return None
        cache = re.search(r"^file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        used = int((folder / "memory.current").read_text())
    except OSError:  # another system, or an older kind of control group
        return None
    return max(0, int(most) - used + (int(cache[1]) if cache else 0))


def format_bytes(size: int) -> str:
    """``1.50 GiB``, or ``20.0 MiB`` where that is less."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
