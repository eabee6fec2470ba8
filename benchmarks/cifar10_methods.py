"""The pruners that `cifar10_oneshot.py` compares, with the grid of damps that each is tuned over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_cap.pruners import (
    CAP,
    MFAC,
    DiagonalFisher,
    FastCAP,
    GradientTimesWeight,
    LayerwiseOBS,
    Magnitude,
    Pruner,
    Random,
    Taylor,
    WoodFisher,
)
from lightning_cap.sparsity.allocation import Global, Uniform

FISHER = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
RELATIVE = (1e-3, 1e-2, 1e-1)
MFAC_ROWS = 256


@dataclass(frozen=True)
class Scale:
    """What all methods share: size of a block, and how many gradient samples of how many images."""

    block_size: int
    num_gradients: int
    samples_per_gradient: int


@dataclass(frozen=True)
class Method:
    """A pruner at a damp; without a grid there is none to tune."""

    make: Callable[[Scale, float], Pruner]
    damps: Sequence[float] = ()

    @property
    def seeded(self) -> bool:
        """Whether its result depends on the seed of the samples."""
        pruner = self.make(Scale(4, 2, 1), 1.0)
        return bool(pruner.num_gradients or pruner.num_inputs or isinstance(pruner, Random))


def _counts(scale: Scale) -> tuple[int, int]:
    return scale.num_gradients, scale.samples_per_gradient


METHODS = {
    "random": Method(lambda s, _: Random()),
    "magnitude, uniform": Method(lambda s, _: Magnitude(Uniform())),
    "magnitude": Method(lambda s, _: Magnitude()),
    "gradient times weight": Method(lambda s, _: GradientTimesWeight(*_counts(s))),
    "Taylor, signed": Method(lambda s, _: Taylor(*_counts(s))),
    "OBD (WF-1)": Method(lambda s, damp: DiagonalFisher(*_counts(s), damp), FISHER),
    "layer-wise OBS, uniform": Method(
        lambda s, damp: LayerwiseOBS(192, s.num_gradients * s.samples_per_gradient, damp), RELATIVE
    ),
    "layer-wise OBS, global": Method(
        lambda s, damp: LayerwiseOBS(192, s.num_gradients * s.samples_per_gradient, damp, Global()), RELATIVE
    ),
    "M-FAC": Method(lambda s, damp: MFAC(2048, min(MFAC_ROWS, s.num_gradients), s.samples_per_gradient, damp), FISHER),
    "WoodFisher, simple update": Method(
        lambda s, damp: WoodFisher(s.block_size, *_counts(s), damp, update="simple"), FISHER
    ),
    "WoodFisher": Method(lambda s, damp: WoodFisher(s.block_size, *_counts(s), damp), FISHER),
    "FastCAP": Method(lambda s, damp: FastCAP(1024, *_counts(s), damp), FISHER),
    "CAP cumulative": Method(lambda s, damp: CAP(s.block_size, *_counts(s), damp, "cumulative"), FISHER),
    "CAP marginal": Method(lambda s, damp: CAP(s.block_size, *_counts(s), damp, "marginal"), FISHER),
}
#: Without ``--methods``.
PAPER = ("magnitude", "CAP cumulative", "CAP marginal")
