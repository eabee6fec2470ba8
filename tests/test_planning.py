from __future__ import annotations

import pytest
import torch

from lightning_cap.errors import ConfigError
from lightning_cap.planning import EventPlan, free_memory, plan_event
from lightning_cap.pruners import CAP, Magnitude
from lightning_cap.targets import Targets

CPU = torch.device("cpu")


def test_an_event_that_cannot_fit_is_refused_with_numbers_and_remedy() -> None:
    with pytest.raises(ConfigError, match=r"block_size: .* needs 3\.00 GiB on cpu, where 2\.00 GiB are free.*smaller"):
        EventPlan(CPU, 3 * 2**30, 2 * 2**30).check()
    EventPlan(CPU, 2**30, 2**30).check()
    EventPlan(CPU, 2**60, None).check()


def test_free_memory_of_the_cpu() -> None:
    free = free_memory(CPU)
    assert free is None or 2**20 < free < 2**50
    assert free_memory(torch.device("meta")) is None


def test_a_block_too_large_for_this_machine_is_refused() -> None:
    if free_memory(CPU) is None:
        pytest.skip("the system does not tell its free memory")
    targets = Targets({"w": torch.empty(2**17, 2**13, device="meta")})
    with pytest.raises(ConfigError, match="smaller block_size"):
        plan_event(CAP(block_size=2**16).peak_bytes(targets), CPU).check()


def test_peak_covers_the_fisher() -> None:
    targets = Targets({"a": torch.ones(10, 10), "b": torch.ones(3)})
    assert CAP(block_size=16).peak_bytes(targets) >= 8 * 16 * 16 * 4
    plan_event(CAP(block_size=16).peak_bytes(targets), CPU).check()
    assert Magnitude().peak_bytes(targets) == 0
