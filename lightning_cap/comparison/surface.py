"""The loss in the plane of the dense weights and two sparse solutions (figure 4 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_cap.comparison.records import SurfaceRecord
from lightning_cap.errors import ConfigError
from lightning_cap.sparsity.targets import Targets


@dataclass(frozen=True)
class LossSurface:
    """Ask a comparison for the loss on ``w0 + α (w1 - w0) + β (w2 - w0)``: the dense weights and two pruned ones.

    Args:
        pruners: Names of the two pruners, ``w1`` and ``w2``.
        sparsity: Of both; one of the comparison's.
        points: Along each axis; the loss is taken ``points²`` times.
        batches: Of the validation data for each point. Default: all.
        margin: How far beyond 0 and 1 the axes go.
    """

    pruners: tuple[str, str]
    sparsity: float
    points: int = 11
    batches: int | None = None
    margin: float = 0.25

    def check(self, names: list[str], sparsities: list[float]) -> None:
        """Refuse what the comparison does not have.

        Raises:
            ConfigError: A pruner or the sparsity is not one of the comparison's, or a number is out of range.
        """
        unknown = [name for name in self.pruners if name not in names]
        if unknown or len(set(self.pruners)) != 2:
            raise ConfigError(f"surface.pruners={list(self.pruners)}: give two different names of {names}.")
        if self.sparsity not in sparsities:
            raise ConfigError(f"surface.sparsity={self.sparsity}: the comparison has {sorted(sparsities)}.")
        if self.points < 2 or (self.batches is not None and self.batches < 1) or not 0 <= self.margin < 10:
            raise ConfigError(
                f"surface: points={self.points}, batches={self.batches}, margin={self.margin}: give at least 2 points, at "
                "least 1 batch, and a margin from 0 to 10."
            )


def measure_surface(
    targets: Targets,
    solutions: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    loss: Callable[[], float],
    surface: LossSurface,
    progress: Callable[[int, int], None],
) -> SurfaceRecord:
    """Take the loss on a grid over the plane; the targets are afterwards as before.

    Args:
        targets: With the dense weights.
        solutions: ``w1`` and ``w2``.
        loss: Of the model as it is now.
        surface: What to take.
        progress: ``progress(done, total)``.

    Returns:
        The record, without fingerprints.
    """
    dense = targets.copies()
    axis = torch.linspace(-surface.margin, 1 + surface.margin, surface.points, dtype=torch.float64).tolist()
    total = len(axis) ** 2
    try:
        corners = []
        for weights in (dense, *solutions):
            targets.restore(weights)
            corners.append(loss())
        plane: list[list[float]] = []
        for b in axis:
            plane.append([])
            for a in axis:
                targets.restore(_point(dense, solutions, a, b))
                plane[-1].append(loss())
                progress(len(axis) * (len(plane) - 1) + len(plane[-1]), total)
    finally:
        targets.restore(dense)
    return SurfaceRecord(
        pruners=tuple(surface.pruners),
        sparsity=surface.sparsity,
        axis=tuple(axis),
        loss=tuple(map(tuple, plane)),
        corners=dict(zip(("dense", *surface.pruners), corners, strict=True)),
    )


def _point(
    dense: Mapping[str, Tensor], solutions: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], a: float, b: float
) -> dict[str, Tensor]:
    one, two = solutions
    return {name: w + a * (one[name].to(w) - w) + b * (two[name].to(w) - w) for name, w in dense.items()}
