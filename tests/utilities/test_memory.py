from __future__ import annotations

import pytest
import torch

from lightning_cap.errors import ConfigError
from lightning_cap.pruners import CAP
from lightning_cap.utilities.memory import free_memory, parse_bytes

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
