"""The pruners that `cifar10_oneshot.py` compares, with the grid of damps that each is tuned over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_cap.healing import DistillHeal, Heal
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
DISTILL = DistillHeal(num_inputs=2048, steps=128, batch_size=32, lr=1e-3)
ROW_BLOCK = 144  # rows of ResNet-20's convolutions are 144, 288 and 576 long


@dataclass(frozen=True)
class Scale:
    """What all methods share: size of a block, and how many gradient samples of how many images."""

    block_size: int
    num_gradients: int
    samples_per_gradient: int


@dataclass(frozen=True)
class Method:
    """A pruner at a damp.

    Attributes:
        make: ``make(scale, damp)``.
        damps: Grid to tune it over; none without.
        heal: What heals its results, which keep their BatchNorm statistics then.
        stages: Prunes in so many steps, each with as many gradients of its own.
    """

    make: Callable[[Scale, float], Pruner]
    damps: Sequence[float] = ()
    heal: Heal | None = None
    stages: int = 1

    @property
    def seeded(self) -> bool:
        """Whether its result depends on the seed of the samples."""
        pruner = self.make(Scale(4, 2, 1), 1.0)
        return pruner.statistic is not None or isinstance(pruner, Random) or self.heal is not None


def _reading(scale: Scale) -> dict[str, int]:
    return {"num_gradients": scale.num_gradients, "samples_per_gradient": scale.samples_per_gradient}


def _in_blocks(scale: Scale, damp: float) -> dict[str, Any]:
    return {"block_size": scale.block_size, "damp": damp, **_reading(scale)}


def _by_layer(scale: Scale, damp: float) -> dict[str, Any]:
    return {"num_inputs": scale.num_gradients * scale.samples_per_gradient, "damp": damp}


def _by_default(scale: Scale, _: float) -> CAP:
    """CAP as it is unless told otherwise, in blocks that end with rows."""
    return CAP(block_size=ROW_BLOCK, **_reading(scale))


METHODS = {
    "random": Method(lambda s, _: Random()),
    "magnitude, uniform": Method(lambda s, _: Magnitude(allocation=Uniform())),
    "magnitude": Method(lambda s, _: Magnitude()),
    "gradient times weight": Method(lambda s, _: GradientTimesWeight(**_reading(s))),
    "Taylor, signed": Method(lambda s, _: Taylor(**_reading(s))),
    "OBD (WF-1)": Method(lambda s, damp: DiagonalFisher(damp=damp, **_reading(s)), FISHER),
    "layer-wise OBS, uniform": Method(lambda s, damp: LayerwiseOBS(**_by_layer(s, damp)), RELATIVE),
    "layer-wise OBS, global": Method(lambda s, damp: LayerwiseOBS(**_by_layer(s, damp), allocation=Global()), RELATIVE),
    "M-FAC": Method(
        lambda s, damp: MFAC(damp=damp, **{**_reading(s), "num_gradients": min(MFAC_ROWS, s.num_gradients)}), FISHER
    ),
    "WoodFisher, simple update": Method(lambda s, damp: WoodFisher(**_in_blocks(s, damp), update="simple"), FISHER),
    "WoodFisher": Method(lambda s, damp: WoodFisher(**_in_blocks(s, damp)), FISHER),
    "FastCAP": Method(lambda s, damp: FastCAP(**{**_in_blocks(s, damp), "block_size": 1024}), FISHER),
    "CAP cumulative": Method(lambda s, damp: CAP(**_in_blocks(s, damp), shrinkage=0.0, ranking="cumulative"), FISHER),
    "CAP marginal": Method(lambda s, damp: CAP(**_in_blocks(s, damp), shrinkage=0.0, ranking="marginal"), FISHER),
    f"CAP marginal, B = {ROW_BLOCK}": Method(
        lambda s, damp: CAP(**{**_in_blocks(s, damp), "block_size": ROW_BLOCK}, shrinkage=0.0), FISHER
    ),
    "CAP, defaults": Method(_by_default),
    "CAP, defaults, 4 stages of a quarter of the gradients": Method(
        lambda s, _: _by_default(replace(s, num_gradients=max(1, s.num_gradients // 4)), 0.0), stages=4
    ),
    "CAP, defaults, distilled": Method(_by_default, heal=DISTILL),
    "magnitude, distilled": Method(lambda s, _: Magnitude(), heal=DISTILL),
}
#: Without ``--methods``.
PAPER = ("magnitude", "CAP cumulative", "CAP marginal")
