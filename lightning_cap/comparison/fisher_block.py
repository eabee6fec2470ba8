"""The average block of the empirical Fisher, to see how much its weights are correlated (figure 16 of the paper)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.errors import ConfigError
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_whole
from lightning_cap.utilities.memory import format_bytes, free_memory

_COPIES = 3  # of the sums of all targets: on the device, over all ranks, on the CPU


def check_block_size(targets: Targets, block_size: int) -> None:
    """Refuse a size that no target has a whole block of, or whose sums there is no memory for; every process must call it.

    Raises:
        ConfigError: It names the largest that works.
    """
    _require_block(targets, block_size)
    free = free_memory(targets.device)
    with distributed.raise_on_all_ranks("Looking for memory for the Fisher block"):
        room = math.isqrt(free // (4 * _COPIES * len(targets))) if free is not None else block_size
        if block_size > room:
            raise ConfigError(
                f"fisher_block={block_size}: a matrix of so many rows and columns for each of {len(targets)} targets is too large "
                f"for the {format_bytes(free or 0)} of memory that are free. Give at most {room}, such as 64."
            )


def _require_block(targets: Targets, block_size: int) -> None:
    require_whole("fisher_block", block_size, 1, max(weight.numel() for weight in targets.values()), 64)


def average_blocks(targets: Targets, gradients: GradientSource, block_size: int) -> dict[str, Tensor]:
    """Mean over the blocks of ``(1/N) Σ g gᵀ`` (equation 3, without damp), in one pass and ``O(B²)`` memory a target.

    The rows of all blocks of a target are one matrix ``(n · K, B)``, whose product with itself is the sum. The incomplete last
    block of a target is left out. Every process must call it.

    Args:
        targets: The weights.
        gradients: Chunks ``{target: (n, *shape)}``.
        block_size: ``B``.

    Returns:
        ``{target: (B, B)}`` float32 on the CPU for each target with at least one whole block, and ``"all"``, the mean over the
        blocks of all of them.

    Raises:
        ConfigError: No target has a whole block.
    """
    _require_block(targets, block_size)
    counts = {name: w.numel() // block_size for name, w in targets.items() if w.numel() >= block_size}
    sums = {name: torch.zeros(block_size, block_size, device=targets[name].device) for name in counts}
    rows = torch.zeros((), device=targets.device)
    for chunk in gradients:
        for name, count in counts.items():
            flat = chunk[name].flatten(1)[:, : count * block_size].reshape(-1, block_size).float()
            sums[name].addmm_(flat.T, flat)
        rows += next(iter(chunk.values())).shape[0]
    total = float(distributed.sum_over_ranks(rows))
    whole = {name: distributed.sum_over_ranks(part).cpu() / total for name, part in sums.items()}
    everything = torch.stack(list(whole.values())).sum(0) / sum(counts.values())
    return {"all": everything, **{name: part / counts[name] for name, part in whole.items()}}
