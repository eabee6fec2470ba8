"""What numbers were measured on and with."""

from __future__ import annotations

import datetime
import os
import platform
from typing import Any

import lightning
import timm
import torch

import lightning_cap
from lightning_cap.utilities.machine import processor_name


def machine() -> dict[str, Any]:
    """Date, processor, threads and versions, for the head of a result file."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "timm": timm.__version__,
        "lightning_cap": lightning_cap.__version__,
    }
