"""Random pruning: what any method must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.pruners.scored import Scored
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.arguments import require_whole


@dataclass(kw_only=True, eq=False)
class Random(Scored):
    """Remove weights by lot. The same seed and target name draw the same lots, so events of one run are nested.

    Needs no gradients. Zeros cost nothing and are pruned first.

    Args:
        seed: Seed of the draw.
        allocation: See `Scored`.
        pattern: See `Scored`.

    Raises:
        ConfigError: ``seed`` is no whole number of at least 0.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("seed", self.seed, at_least=0)

    def _saliency(self, targets: Targets, layout: BlockLayout, weights: Tensor, gradients: GradientSource) -> Tensor:
        drawn = {}
        for name, weight in targets.items():
            generator = torch.Generator().manual_seed(hash((self.seed, zlib.crc32(name.encode()))) % 2**63)
            drawn[name] = 1 - torch.rand(weight.shape, generator=generator)  # in (0, 1]
        return layout.pack(drawn, torch.float32, weights.device).masked_fill_(weights == 0, 0.0)
