"""What a goal counts: the price of weights, when a goal is reached, and the steps on the way to it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_args

from torch import nn

from lightning_cap.errors import UnsupportedError
from lightning_cap.sparsity.unit_prices import UnitPrices, flop_prices, parameter_prices
from lightning_cap.sparsity.units import Units
from lightning_cap.utilities.arguments import require_choice, require_instance, require_real, require_whole
from lightning_cap.utilities.decimals import round_share

Shapes = Mapping[str, tuple[int, ...]]

MOST_STEPS = 10_000  # of a way to a goal, each with gradients of its own

#: How sparsities lead to a goal: the density falls by the same factor in each step, or the sparsity rises by the same amount.
StepPath = Literal["exponential", "linear"]


class Cost(ABC):
    """What a goal counts: the share of the total price that is to be saved.

    For pruners of weights it gives every target the price of one of its weights; for pruners of units, a price to every width.

    Attributes:
        name: Of a share saved, in logs and names of files.
    """

    name: ClassVar[str] = "saved"

    @abstractmethod
    def prices(self, shapes: Shapes) -> dict[str, int]:
        """Price of one weight of each target.

        Raises:
            UnsupportedError: Zeros inside a tensor save nothing of what the goal counts.
        """

    def unit_prices(self, units: Units, shapes: Shapes) -> UnitPrices:
        """Price of the model by how many units of each group are kept. Call `prepare` before.

        Raises:
            UnsupportedError: It is a cost of single weights alone.
        """
        raise UnsupportedError(
            f"cost={type(self).__name__}: it prices weights, not units. Give Parameters(), Flops() or Latency()."
        )

    def prepare(  # noqa: B027 - optional
        self, model: nn.Module, units: Units, example_input: Any, folder: Path | None = None
    ) -> None:
        """Measure what the prices need of the model, such as times of its layers. Every rank must call it.

        Args:
            model: The model that gets ``example_input``.
            units: Of the model, by the model's own names.
            example_input: As for `Units.from_model`.
            folder: Of the run, for what is to be kept.
        """

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


@dataclass(frozen=True)
class Parameters(Cost):
    """Every weight counts alike: a goal is a share of zeros. The default."""

    name: ClassVar[str] = "sparsity"

    def prices(self, shapes: Shapes) -> dict[str, int]:
        """1 for each target."""
        require_shapes(shapes)
        return dict.fromkeys(shapes, 1)

    def unit_prices(self, units: Units, shapes: Shapes) -> UnitPrices:
        """Weights of all targets."""
        require_shapes(shapes)
        return parameter_prices(units, shapes)


class UnitCost(Cost):
    """What zeros inside a tensor do not save."""

    def prices(self, shapes: Shapes) -> dict[str, int]:
        """Refused."""
        raise UnsupportedError(
            f"cost={type(self).__name__}: single zeros inside a weight save none of it. Prune units, e.g. with "
            "pruner=CAPUnits(), or count zeros with cost=Parameters()."
        )


@dataclass(frozen=True)
class Flops(UnitCost):
    """FLOPs of the whole model on one example, 2 for each multiply-add, as `torch.utils.flop_counter` counts them."""

    name: ClassVar[str] = "flops"

    def unit_prices(self, units: Units, shapes: Shapes) -> UnitPrices:
        """What each layer takes at its widths; all else is constant."""
        require_shapes(shapes)
        return flop_prices(units)


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


def steps_to(goal: float, start: float, num_steps: int, path: StepPath = "exponential") -> list[float]:
    """Sparsities from ``start`` to ``goal``, the last one ``goal`` itself.

    Args:
        goal: Sparsity to reach.
        start: Sparsity that is reached already.
        num_steps: How many, from 1 to 10,000.
        path: ``"exponential"``: each step keeps the same share of what the one before kept, so that steps grow smaller;
            ``"linear"``: evenly spaced. To a goal of 1, which keeps nothing, every path is linear.

    Raises:
        ConfigError: A number is out of range, or ``path`` is none of these.
    """
    require_real("goal", goal, "[0, 1]", example=0.5)
    require_real("start", start, "[0, 1]", example=0.0)
    require_whole("num_steps", num_steps, at_most=MOST_STEPS, example=4)
    require_path_of_steps("path", path)
    shares = [step / num_steps for step in range(1, num_steps)]
    if path == "linear" or 1 in (goal, start):
        return [start + (goal - start) * share for share in shares] + [goal]
    low, high = min(start, goal), max(start, goal)
    kept, left = 1 - start, 1 - goal
    return [min(max(1 - kept * (left / kept) ** share, low), high) for share in shares] + [goal]


def require_path_of_steps(name: str, value: object) -> None:
    """Refuse what is no `StepPath`.

    Args:
        name: Of the argument.
        value: Of the argument.

    Raises:
        ConfigError: It is something else.
    """
    require_choice(name, value, get_args(StepPath))
