"""How much a model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_Shape = tuple[int, ...]


def _fused_attention(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


#: What torch 2.6 does not count by itself: fused attention on CPUs.
_ALSO_COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention}


def flop_counter() -> FlopCounterMode:
    """Counts FLOPs inside a ``with`` block: 2 for each multiply-add of products, convolutions and attention."""
    return FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED)


def count_flops(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """FLOPs of a call, 2 for each multiply-add of products, convolutions and attention; zeros count as other numbers do."""
    with torch.no_grad(), flop_counter() as counter:
        call(*args, **kwargs)
    return int(counter.get_total_flops())
