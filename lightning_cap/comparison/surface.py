"""The loss in the plane of the dense weights and two sparse solutions (figure 4 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_cap.comparison.records import UNPRUNED, SurfaceRecord
from lightning_cap.errors import ConfigError
from lightning_cap.healing.parts import ModelParts
from lightning_cap.utilities.arguments import require_real, require_whole, shown

_MOST_POINTS = 201  # along an axis


@dataclass(frozen=True)
class LossSurface:
    """Ask a comparison for the loss on ``w0 + α (w1 - w0) + β (w2 - w0)``: the weights before pruning and two pruned ones.

    Args:
        pruners: Names of the two pruners, ``w1`` and ``w2``.
        sparsity: Of both; one of the comparison's.
        points: Along each axis; the loss is taken ``points²`` times.
        batches: Of the validation data for each point. Default: all.
        margin: How far beyond 0 and 1 the axes go.

    Raises:
        ConfigError: An argument cannot work.
    """

    pruners: tuple[str, str]
    sparsity: float
    points: int = 11
    batches: int | None = None
    margin: float = 0.25

    def __post_init__(self) -> None:
        if (
            isinstance(self.pruners, str)
            or not isinstance(self.pruners, Sequence)
            or len(self.pruners) != 2
            or not all(isinstance(name, str) for name in self.pruners)
        ):
            raise ConfigError(f"pruners={shown(self.pruners)}: give the names of two pruners, such as ['CAP', 'OBD'].")
        require_real("sparsity", self.sparsity, "[0, 1)", 0.8)
        require_whole("points", self.points, 2, _MOST_POINTS)
        if self.batches is not None:
            require_whole("batches", self.batches)
        require_real("margin", self.margin, "[0, 10]", 0.25)

    def check(self, names: list[str], sparsities: list[float]) -> None:
        """Refuse what the comparison does not have.

        Raises:
            ConfigError: A pruner or the sparsity is not one of the comparison's.
        """
        unknown = [name for name in self.pruners if name not in names]
        if unknown or len(set(self.pruners)) != 2:
            raise ConfigError(
                f"surface.pruners={shown(list(self.pruners))}: give two different names of {shown(names)}."
            )
        if self.sparsity not in sparsities:
            raise ConfigError(f"surface.sparsity={self.sparsity}: the comparison has {shown(sorted(sparsities))}.")


def measure_surface(
    parts: ModelParts,
    solutions: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    loss: Callable[[], float],
    surface: LossSurface,
    progress: Callable[[int, int], None],
) -> SurfaceRecord:
    """Take the loss on a grid over the plane; the model is afterwards as before.

    Args:
        parts: What differs between the solutions, with the dense weights.
        solutions: ``w1`` and ``w2``.
        loss: Of the model as it is now.
        surface: What to take.
        progress: ``progress(done, total)``.

    Returns:
        The record, without fingerprints.
    """
    dense = parts.copies()
    axis = torch.linspace(-surface.margin, 1 + surface.margin, surface.points, dtype=torch.float64).tolist()
    total = len(axis) ** 2
    try:
        corners = []
        for weights in (dense, *solutions):
            parts.restore(weights)
            corners.append(loss())
        plane: list[list[float]] = []
        for b in axis:
            plane.append([])
            for a in axis:
                parts.restore(_point(dense, solutions, a, b))
                plane[-1].append(loss())
                progress(len(axis) * (len(plane) - 1) + len(plane[-1]), total)
    finally:
        parts.restore(dense)
    return SurfaceRecord(
        pruners=tuple(surface.pruners),
        sparsity=surface.sparsity,
        axis=tuple(axis),
        loss=tuple(map(tuple, plane)),
        corners=dict(zip((UNPRUNED, *surface.pruners), corners, strict=True)),
    )


def _point(
    dense: Mapping[str, Tensor], solutions: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], a: float, b: float
) -> dict[str, Tensor]:
    one, two = solutions
    return {name: w + a * (one[name].to(w) - w) + b * (two[name].to(w) - w) for name, w in dense.items()}
