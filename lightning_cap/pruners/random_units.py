"""Random pruning of units: what any method must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.pruners.unit_scores import Normalize, ScoredUnits
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import units_of
from lightning_cap.utilities.arguments import require_whole


@dataclass(kw_only=True, eq=False)
class RandomUnits(ScoredUnits):
    """Remove units by lot. The same seed and group name draw the same lots, so events of one run are nested.

    Needs no gradients. By default a unit's chance does not depend on what it saves.

    Args:
        seed: Seed of the draw.
        normalize: See `ScoredUnits`.
        cost: What a goal counts. See `UnitPruner`.
        allocation: How units are shared out over the groups. See `UnitPruner`.

    Raises:
        ConfigError: An argument is out of range.
    """

    seed: int = 0
    normalize: Normalize = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole("seed", self.seed, at_least=0)

    def _saliency(self, targets: Targets, gradients: GradientSource) -> dict[str, Tensor]:
        drawn = {}
        for name, group in units_of(targets).items():
            generator = torch.Generator().manual_seed(hash((self.seed, zlib.crc32(name.encode()))) % 2**63)
            drawn[name] = 1 - torch.rand(group.size, generator=generator, dtype=torch.float64)  # in (0, 1]
        return drawn
