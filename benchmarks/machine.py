"""What numbers were measured on and with."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import lightning
import timm
import torch

import lightning_cap


def machine() -> dict[str, Any]:
    """Date, processor, threads and versions, for the head of a result file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "timm": timm.__version__,
        "lightning_cap": lightning_cap.__version__,
    }
