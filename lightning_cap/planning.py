"""The memory plan of a pruning event, made before it runs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from lightning_cap.errors import ConfigError


@dataclass(frozen=True)
class EventPlan:
    """What an event will take.

    Attributes:
        device: Where the Fisher lives and is solved.
        peak_bytes: Peak extra memory of the pruner.
        free_bytes: Memory that is free there now, None if it cannot be told.
    """

    device: torch.device
    peak_bytes: int
    free_bytes: int | None

    def check(self) -> None:
        """Refuse an event that cannot fit.

        Raises:
            ConfigError: It needs more memory than is free.
        """
        if self.free_bytes is not None and self.peak_bytes > self.free_bytes:
            raise ConfigError(
                f"block_size: the pruning event needs {_gib(self.peak_bytes)} on {self.device}, where "
                f"{_gib(self.free_bytes)} are free. Choose a smaller block_size, or fewer targets with include/exclude."
            )


def plan_event(peak_bytes: int, device: torch.device) -> EventPlan:
    """The plan for a pruner that needs ``peak_bytes`` on ``device``."""
    return EventPlan(device, peak_bytes, free_memory(device))


def free_memory(device: torch.device) -> int | None:
    """Bytes free on ``device``, torch's own cached blocks included; None where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        try:
            with open("/proc/meminfo") as lines:  # counts the page cache as free, which sysconf does not
                for line in lines:
                    if line.startswith("MemAvailable:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
