from __future__ import annotations

import pytest

from lightning_cap.errors import ConfigError
from lightning_cap.planning.machine import Settings, machine_of
from tests.support.planned import configured


def test_memory_that_is_given_is_less_what_the_model_takes() -> None:
    trainer = configured(devices=2, strategy="ddp", num_nodes=2)
    here = machine_of(trainer, Settings(host_memory="10GB"), 10**9)
    assert (here.device.type, here.processes, here.device_bytes) == ("cpu", 4, 4 * 10**9)
    gpu = machine_of(trainer, Settings(accelerator="gpu", device_memory="80GB", host_memory="100GB"), 10**9)
    assert (gpu.device.type, gpu.device_bytes, gpu.host_bytes) == ("cuda", 79 * 10**9, 50 * 10**9)
    assert machine_of(trainer, Settings(accelerator="gpu"), 0).host_bytes is None
    free = machine_of(trainer, Settings(), 10**9).device_bytes
    assert free is None or free > 0


@pytest.mark.parametrize("name", ["device_memory", "host_memory"])
def test_no_amount_of_memory(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='much': give bytes"):
        Settings(**{name: "much"})  # type: ignore[arg-type]
