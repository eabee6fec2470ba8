from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from lightning_cap.errors import ConfigError
from lightning_cap.pruners import CAP
from lightning_cap.utilities.memory import free_memory, parse_bytes, release_memory

CPU = torch.device("cpu")


def test_free_memory_of_the_cpu() -> None:
    free = free_memory(CPU)
    assert free is None or 2**20 < free < 2**50
    assert free_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("300mb", 3 * 10**8),
        ("7", 7),
        (12, 12),
        ("2K", 2000),
        (None, None),
    ],
)
def test_amounts_of_memory(text: str | int | None, size: int | None) -> None:
    assert parse_bytes(text, "max_memory") == size


@pytest.mark.parametrize("text", ["", "-1GB", "GB", "12 parsecs", 0, True, "1e9"])
def test_what_is_no_amount_of_memory_is_refused(text: str | int) -> None:
    with pytest.raises(ConfigError, match=r"max_memory=.*such as '20GB'"):
        CAP(max_memory=text)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc gives memory back when asked")
def test_freed_memory_goes_back_to_the_system() -> None:
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096  # noqa: E731
    torch.ones(2**22)  # 16 MiB: from now on tensors of such sizes are cut from a heap
    small = [torch.ones(2**14) for _ in range(800)]  # 50 MiB
    last = small[-1].clone()  # keeps the end of the heap
    held = resident()
    del small
    release_memory(torch.device("cpu"))
    assert held - resident() > 2**25
    assert float(last.sum()) == 2**14
