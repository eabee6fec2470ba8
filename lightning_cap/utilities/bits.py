"""Bool tensors as bits, eight to a byte."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Bool ``(..., n)`` -> uint8 ``(..., ceil(n / 8))`` on the same device, the first element in the lowest bit."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return torch.bitwise_left_shift(padded, _places(mask)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The inverse of `pack_bits`: bool ``(..., count)``."""
    unpacked = torch.bitwise_right_shift(bits.unsqueeze(-1), _places(bits)).bitwise_and(1)
    return unpacked.flatten(-2)[..., :count].bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
