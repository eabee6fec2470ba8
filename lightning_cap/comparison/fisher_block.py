"""The average block of the empirical Fisher, to see how much its weights are correlated (figure 16 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.errors import ConfigError
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed


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
    counts = {name: w.numel() // block_size for name, w in targets.items() if w.numel() >= block_size > 0}
    if not counts:
        largest = max(weight.numel() for weight in targets.values())
        raise ConfigError(
            f"fisher_block={block_size}: give a size from 1 to {largest}, the weights of the largest target."
        )
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
