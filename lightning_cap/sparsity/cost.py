"""What a goal counts: the price of weights, when a goal is reached, and the steps on the way to it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import cast

from lightning_cap.utilities.arguments import require_instance, require_real, require_whole
from lightning_cap.utilities.decimals import round_share

Shapes = Mapping[str, tuple[int, ...]]

MOST_STEPS = 10_000  # of a way to a goal, each with gradients of its own


class Cost(ABC):
    """Gives every target the price of one of its weights. A goal is the share of the total price that is to be saved."""

    @abstractmethod
    def prices(self, shapes: Shapes) -> dict[str, int]:
        """Price of one weight of each target."""

    def total(self, shapes: Shapes) -> int:
        """Price of all weights of all targets."""
        require_shapes(shapes)
        return sum(price * math.prod(shapes[name]) for name, price in self.prices(shapes).items())

    def saved(self, shapes: Shapes, zeros: Mapping[str, int]) -> int:
        """Price of the zeros that each target has."""
        require_zeros("zeros", shapes, zeros)
        return sum(price * zeros[name] for name, price in self.prices(shapes).items())

    def budget(self, goal: float, total: int) -> int:
        """What a goal saves of a total: exactly ``floor(goal · total + 0.5)``, of the goal as its decimals are written."""
        require_real("goal", goal, "[0, 1]", example=0.5)
        require_whole("total", total, at_least=0)
        return round_share(goal, total)

    def is_exceeded(self, goal: float, saved: int, total: int) -> bool:
        """Whether more is saved already than the goal asks for, so that there is nothing left to prune."""
        require_whole("saved", saved, at_least=0)
        return saved > self.budget(goal, total)


class Parameters(Cost):
    """Every weight counts alike: a goal is a share of zeros. The default."""

    def prices(self, shapes: Shapes) -> dict[str, int]:
        """1 for each target."""
        require_shapes(shapes)
        return dict.fromkeys(shapes, 1)


def require_shapes(shapes: object) -> None:
    """Refuse what is no mapping from targets to their shapes.

    Raises:
        ConfigError: It is something else.
    """
    require_instance("shapes", shapes, Mapping, "targets.shapes")


def require_zeros(name: str, shapes: object, zeros: object) -> None:
    """Refuse what is no number of zeros for each target.

    Args:
        name: Of the argument.
        shapes: Shape of each target.
        zeros: ``{target: zeros}``.

    Raises:
        ConfigError: It is something else, or a target has none.
    """
    require_shapes(shapes)
    require_instance(name, zeros, Mapping, "{target name: number of its zeros}")
    for target in cast(Shapes, shapes):
        require_whole(f"{name}[{target!r}]", cast("Mapping[str, object]", zeros).get(target), at_least=0)


def steps_to(goal: float, start: float, num_steps: int) -> list[float]:
    """Evenly spaced sparsities from ``start`` to ``goal``, the last one ``goal`` itself.

    Args:
        goal: Sparsity to reach.
        start: Sparsity that is reached already.
        num_steps: How many, from 1 to 10,000.

    Raises:
        ConfigError: A number is out of range.
    """
    require_real("goal", goal, "[0, 1]", example=0.5)
    require_real("start", start, "[0, 1]", example=0.0)
    require_whole("num_steps", num_steps, at_most=MOST_STEPS, example=4)
    return [start + (goal - start) * step / num_steps for step in range(1, num_steps)] + [goal]
