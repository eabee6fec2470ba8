"""Blocks that do not factor are tried again: in float64, then with ten times the damp, until they do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_cap.errors import GradientError

#: ``attempt(blocks, damp, dtype)`` works on ``blocks`` ``(k,)`` with ``damp`` ``(k,)``. It keeps the results of those that succeed
#: and says which they are, ``(k,)`` bool. The others come back with more precision or more damp.
Attempt = Callable[[Tensor, Tensor, torch.dtype], Tensor]

_FACTOR = 10.0


def solve_with_damping(blocks: Tensor, damp: Tensor, dtype: torch.dtype, attempt: Attempt) -> None:
    """Attempt all blocks, and those that failed again and again, until none is left.

    Args:
        blocks: ``(k,)`` int64 indices.
        damp: ``(k,)`` float64, what each is tried with first.
        dtype: What they are tried in first; after float32 comes float64, and only then more damp.
        attempt: The work.

    Raises:
        GradientError: A block cannot be made invertible.
    """
    while len(blocks):
        failed = ~attempt(blocks, damp, dtype)
        blocks, damp = blocks[failed], damp[failed]
        if len(blocks) and dtype == torch.float64:
            damp = more_damp(damp)
        dtype = torch.float64


def more_damp(damp: Tensor) -> Tensor:
    """Ten times the damp.

    Raises:
        GradientError: It is so large that the blocks cannot be finite.
    """
    damp = damp * _FACTOR
    if not bool(torch.isfinite(damp).all()):
        raise GradientError("fisher: a block is not finite, so no damp makes it invertible. Check the gradients for NaN and "
                            "infinity.")  # fmt: skip
    return damp
