"""What a number was measured on and with."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import shown


@dataclass(frozen=True)
class Machine:
    """A computer, as far as measured times depend on it.

    Attributes:
        name: Of the machine in its network.
        processor: Model of the CPU.
        accelerator: Model of the GPU that was used, empty for none.
        torch: Version.
    """

    name: str
    processor: str
    accelerator: str
    torch: str


def this_machine(device: torch.device) -> Machine:
    """The machine that this process runs on.

    Args:
        device: What the model runs on.
    """
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    return Machine(
        name=platform.node(),
        processor=processor_name(),
        accelerator="" if device.type == "cpu" else accelerator,
        torch=torch.__version__,
    )


def processor_name() -> str:
    """Model of the CPU, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def require_device(name: str, value: object) -> torch.device:
    """A device that is there.

    Args:
        name: Of the argument.
        value: Such as ``"cpu"``, ``"cuda:0"`` or a `torch.device`.

    Raises:
        ConfigError: It is none, or this machine does not have it.
    """
    try:
        if not isinstance(value, (str, torch.device)):
            raise TypeError
        device = torch.device(value)
    except (TypeError, RuntimeError):
        raise ConfigError(f"{name}={shown(value)}: give a device, such as 'cpu' or 'cuda'.") from None
    if device.type == "cpu":
        return torch.device("cpu")
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if there is None or device.type != there.type or (device.index or 0) >= torch.accelerator.device_count():
        here = "" if there is None else f" or '{there.type}'"
        raise ConfigError(f"{name}={shown(value)}: this machine has no such device. Give 'cpu'{here}.")
    return torch.device(device.type, device.index or 0)
