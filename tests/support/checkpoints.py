"""Small Lightning checkpoints."""

from __future__ import annotations

import os
from typing import Any

import torch


def checkpoint(**more: Any) -> dict[str, Any]:
    """What a Trainer saves, as far as it is looked at before it is loaded."""
    return {
        "state_dict": {"weight": torch.ones(3)},
        "pytorch-lightning_version": "2.5.0",
        "optimizer_states": [],
        "lr_schedulers": [],
        "loops": {},
        **more,
    }


class RunsCode:
    """Makes a file, if its pickle is ever loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran-code",)
