"""How much a model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_flops(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of a call, 2 for each multiply-add of products, convolutions and attention; zeros count as other numbers do."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(*args, **kwargs)
    return int(counter.get_total_flops())
