"""The methods that `imagenet_vit_tiny.py` compares, each at the damp that did best on held-out training images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lightning_cap.healing import DistillHeal, Heal, LayerwiseHeal
from lightning_cap.pruners import (
    CAP,
    MFAC,
    DiagonalFisher,
    FastCAP,
    GradientTimesWeight,
    LayerwiseOBS,
    Magnitude,
    Pruner,
    RelativeDamp,
    Taylor,
    WoodFisher,
)
from lightning_cap.sparsity import NofM

SHRINKAGE, FRACTION = 0.5, 0.02


@dataclass(frozen=True)
class Method:
    """A pruner of blocks of ``B`` from ``N`` gradients.

    Attributes:
        make: ``make(B, N)``.
        shrinkage: Of its Fisher.
        heals: What its results are healed by, each alone.
    """

    make: Callable[[int, int], Pruner]
    shrinkage: float = 0.0
    heals: Mapping[str, Heal] = field(default_factory=dict)

    @property
    def seeded(self) -> bool:
        """Whether its result depends on the seed of the samples."""
        return self.make(4, 2).statistic is not None or bool(self.heals)

    @property
    def reads_gradients(self) -> bool:
        """Whether it reads the Fisher blocks that methods share."""
        return isinstance(self.make(4, 2), (CAP, WoodFisher))


def cap(
    damp: float | RelativeDamp, ranking: str = "marginal", pattern: NofM | None = None
) -> Callable[[int, int], Pruner]:
    """CAP at a damp."""
    return lambda B, N: CAP(block_size=B, num_gradients=N, damp=damp, ranking=ranking, pattern=pattern)  # type: ignore[arg-type]


def woodfisher(damp: float) -> Callable[[int, int], Pruner]:
    """WoodFisher at a damp."""
    return lambda B, N: WoodFisher(block_size=B, num_gradients=N, damp=damp)


def mfac(damp: float | RelativeDamp) -> Callable[[int, int], Pruner]:
    """M-FAC at a damp; of the gradients a quarter, since it keeps them all."""
    return lambda B, N: MFAC(num_gradients=max(2, N // 4), damp=damp)


def fast_cap(damp: float | RelativeDamp) -> Callable[[int, int], Pruner]:
    """FastCAP at a damp."""
    return lambda B, N: FastCAP(block_size=B, num_gradients=N, damp=damp)


BOTH = {"layer-wise": LayerwiseHeal(), "distilled": DistillHeal()}
METHODS = {
    "magnitude": Method(lambda B, N: Magnitude()),
    "layer-wise OBS": Method(lambda B, N: LayerwiseOBS(num_inputs=512)),
    "WoodFisher": Method(woodfisher(1e-4)),
    "diagonal Fisher (OBD)": Method(lambda B, N: DiagonalFisher(num_gradients=N)),
    "gradient times weight": Method(lambda B, N: GradientTimesWeight(num_gradients=N)),
    "Taylor": Method(lambda B, N: Taylor(num_gradients=N)),
    "M-FAC": Method(mfac(RelativeDamp(FRACTION))),
    "FastCAP": Method(fast_cap(RelativeDamp(FRACTION))),
    "CAP, published": Method(cap(1e-8, "cumulative")),
    "CAP, damp 1e-4": Method(cap(1e-4)),
    "CAP, shrunk": Method(cap(RelativeDamp(FRACTION)), SHRINKAGE, {"distilled": DistillHeal()}),
    "CAP, shrunk, layer-wise": Method(cap(RelativeDamp(FRACTION)), SHRINKAGE, {"layer-wise": LayerwiseHeal()}),
    "CAP, damp 1e-4, healed": Method(cap(1e-4), heals=BOTH),
    "magnitude, healed": Method(lambda B, N: Magnitude(), heals={"distilled": DistillHeal()}),
    "magnitude 2:4": Method(lambda B, N: Magnitude(pattern=NofM(2, 4))),
    "CAP, damp 1e-4, 2:4": Method(cap(1e-4, pattern=NofM(2, 4))),
    "CAP, shrunk, 2:4": Method(
        cap(RelativeDamp(FRACTION), pattern=NofM(2, 4)), SHRINKAGE, {"distilled": DistillHeal()}
    ),
    **{f"M-FAC, damp {damp:g}": Method(mfac(damp)) for damp in (1e-6, 1e-4)},
    **{f"FastCAP, damp {damp:g}": Method(fast_cap(damp)) for damp in (1e-6, 1e-4)},
    **{f"damp {damp:g}": Method(cap(damp)) for damp in (1e-8, 1e-6, 1e-5, 1e-3)},
    **{f"relative damp {f:g}": Method(cap(RelativeDamp(f))) for f in (0.03, 0.1, 0.3)},
    **{f"shrinkage {s:g}": Method(cap(RelativeDamp(FRACTION)), s) for s in (0.3, 0.8)},
    **{f"shrinkage {SHRINKAGE:g}, relative damp {f:g}": Method(cap(RelativeDamp(f)), SHRINKAGE) for f in (0.005, 0.05)},
}
#: Names that stand for several.
SETS = {
    "2:4": ["magnitude 2:4", "CAP, damp 1e-4, 2:4", "CAP, shrunk, 2:4"],
    "others": ["diagonal Fisher (OBD)", "gradient times weight", "Taylor", "M-FAC", "FastCAP", "WoodFisher", "layer-wise OBS"],
    "table": ["magnitude", "layer-wise OBS", "WoodFisher", "CAP, published", "CAP, damp 1e-4", "CAP, shrunk", "magnitude 2:4",
              "CAP, damp 1e-4, 2:4", "CAP, shrunk, 2:4"],
    "heal": ["magnitude, healed", "CAP, damp 1e-4, healed", "CAP, shrunk, layer-wise"],
    "ablation": ["CAP, damp 1e-4", *[name for name in METHODS if name.startswith(("damp", "relative", "shrinkage"))],
                 "CAP, shrunk"],
}  # fmt: skip
