from __future__ import annotations

import platform

import pytest
import torch

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.machine import require_device, this_machine


def test_a_machine_is_told_by_name_and_chips():
    machine = this_machine(torch.device("cpu"))
    assert machine.name == platform.node()
    assert machine.processor
    assert machine.accelerator == ""
    assert machine.torch == torch.__version__


@pytest.mark.parametrize("value", ["cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu_is_always_there(value):
    assert require_device("device", value) == torch.device("cpu")


@pytest.mark.parametrize("value", ["cuda:77", "meta", "hpu"])
def test_a_device_that_is_not_there_is_refused(value):
    with pytest.raises(ConfigError, match=f"device='{value}': this machine has no such device. Give 'cpu'"):
        require_device("device", value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_told_by_its_model():
    assert require_device("device", "cuda") == torch.device("cuda", 0)
    assert this_machine(torch.device("cuda", 0)).accelerator == torch.cuda.get_device_name(0)
