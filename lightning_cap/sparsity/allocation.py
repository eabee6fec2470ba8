"""How the zeros of one model are shared out over its targets."""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from lightning_cap.errors import ConfigError
from lightning_cap.sparsity.cost import Shapes, require_shapes, require_zeros
from lightning_cap.utilities.arguments import require_instance, require_real, require_text, require_whole
from lightning_cap.utilities.decimals import as_written, round_share

#: ``[(target names, zeros for them together, existing ones included)]``.
Budgets = list[tuple[list[str], int]]


class Allocation(ABC):
    """Splits the zeros over the targets. Subclasses are frozen dataclasses.

    Attributes:
        min_density: Fraction of its weights that every target keeps at least, in [0, 1), against the collapse of a
            layer (Gupta et al. 2022, "Global MP"). A target that has fewer already keeps those.
    """

    min_density: float = 0.0

    @abstractmethod
    def budgets(self, shapes: Shapes, existing: Mapping[str, int], zeros: int) -> Budgets:
        """Split the total into budgets, each for some targets that compete for it.

        Args:
            shapes: Shape of each target.
            existing: Zeros that each target has already (they stay).
            zeros: Zeros in all, existing ones included, ``sum(existing) <= zeros <= weights``.

        Returns:
            Every target in exactly one entry; the zeros add up to ``zeros``. Floors hold in entries of one target; where
            several compete, `max_zeros` says how many zeros each may have.

        Raises:
            ConfigError: The zeros cannot be placed.
        """

    def check(self, shapes: Shapes) -> None:  # noqa: B027 - optional
        """Refuse targets that the allocation does not fit, before anything runs.

        Raises:
            ConfigError: It names targets that are not there.
        """

    def max_zeros(self, shapes: Shapes, existing: Mapping[str, int]) -> dict[str, int]:
        """How many zeros each target may have, by its floor."""
        require_zeros("existing", shapes, existing)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        floor = as_written(self.min_density)  # 0.05 of 1,000 weights is 50, not a rounding above
        kept = {name: math.ceil(floor * size) for name, size in sizes.items()}
        return {name: max(existing[name], size - kept[name]) for name, size in sizes.items()}


@dataclass(frozen=True)
class Global(Allocation):
    """All weights of all targets compete.

    Args:
        min_density: See `Allocation`.
    """

    min_density: float = 0.0

    def __post_init__(self) -> None:
        require_real("min_density", self.min_density, "[0, 1)", example=0.05)

    def budgets(self, shapes: Shapes, existing: Mapping[str, int], zeros: int) -> Budgets:
        """One budget for all."""
        _check_room(sum(self.max_zeros(shapes, existing).values()), zeros, self)
        return [(list(shapes), zeros)]


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every target has the same sparsity, up to rounding, its floor and zeros that it has already.

    Args:
        min_density: See `Allocation`.
    """

    min_density: float = 0.0

    def __post_init__(self) -> None:
        require_real("min_density", self.min_density, "[0, 1)", example=0.05)

    def budgets(self, shapes: Shapes, existing: Mapping[str, int], zeros: int) -> Budgets:
        """One budget per target."""
        most = self.max_zeros(shapes, existing)
        _check_room(sum(most.values()), zeros, self)
        sizes = {name: Fraction(math.prod(shape)) for name, shape in shapes.items()}
        return [([name], share) for name, share in apportion(sizes, existing, most, zeros).items()]


@dataclass(frozen=True)
class ERK(Allocation):
    """Erdős-Rényi kernel: larger layers are sparser (Evci et al. 2020, section 3, after Mocanu et al. 2018).

    The density of a target is proportional to the sum of its dimensions over their product, ``(O + I + kH + kW) / (O·I·kH·kW)``;
    targets that would be more than dense stay dense, and the others share the rest.

    Args:
        min_density: See `Allocation`.
    """

    min_density: float = 0.0

    def __post_init__(self) -> None:
        require_real("min_density", self.min_density, "[0, 1)", example=0.05)

    def budgets(self, shapes: Shapes, existing: Mapping[str, int], zeros: int) -> Budgets:
        """One budget per target."""
        most = self.max_zeros(shapes, existing)
        _check_room(sum(most.values()), zeros, self)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        wanted = {name: Fraction(sum(shape)) for name, shape in shapes.items()}  # kept weights: density times size
        lower = {name: sizes[name] - most[name] for name in sizes}
        upper = {name: sizes[name] - existing[name] for name in sizes}
        kept = apportion(wanted, lower, upper, sum(sizes.values()) - zeros)
        return [([name], sizes[name] - kept[name]) for name in sizes]


@dataclass(frozen=True)
class PerTarget(Allocation):
    """Given sparsities for some targets; the others compete for what is left of the total.

    A target's own name goes before a glob, and an earlier glob before a later one. If all targets are named, the total
    that is asked for must be the map's own (within half a percent, which is spread over them).

    Args:
        sparsities: Glob or name of a target -> its sparsity in [0, 1).
        min_density: Floor of the targets that are not named. See `Allocation`.

    Raises:
        ConfigError: A sparsity is not one.
    """

    sparsities: dict[str, float] = field(default_factory=dict)
    min_density: float = 0.0

    def __post_init__(self) -> None:
        require_real("min_density", self.min_density, "[0, 1)", example=0.05)
        require_instance("sparsities", self.sparsities, Mapping, '{"blocks.0.*": 0.5}')
        for glob, sparsity in self.sparsities.items():
            require_text("sparsities", glob, "blocks.0.*")
            require_real(f"sparsities[{glob!r}]", sparsity, "[0, 1)", example=0.5)

    def check(self, shapes: Shapes) -> None:
        """Refuse globs that match no target."""
        require_shapes(shapes)
        for glob in self.sparsities:
            if not any(glob == name or fnmatch.fnmatchcase(name, glob) for name in shapes):
                raise ConfigError(
                    f"sparsities: {glob!r} matches none of the {len(shapes)} targets, first {next(iter(shapes))!r}. Name "
                    "targets, or leave it out."
                )

    def budgets(self, shapes: Shapes, existing: Mapping[str, int], zeros: int) -> Budgets:
        """One budget for each named target, and one for all others."""
        self.check(shapes)
        require_zeros("existing", shapes, existing)
        require_whole("zeros", zeros, at_least=0)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        given = {name: self._given(name) for name in shapes}
        named = {n: max(existing[n], round_share(s, sizes[n])) for n, s in given.items() if s is not None}
        others = {n: shape for n, shape in shapes.items() if n not in named}
        rest = zeros - sum(named.values())
        if not others and abs(rest) <= 0.005 * sum(sizes.values()):
            wanted = {n: Fraction(max(1, count)) for n, count in named.items()}
            return [([n], share) for n, share in apportion(wanted, existing, sizes, zeros).items()]
        low = sum(existing[n] for n in others)
        high = sum(self.max_zeros(others, existing).values())
        if not low <= rest <= high:
            numel, fixed = sum(sizes.values()), sum(named.values())
            raise ConfigError(
                f"sparsities: the named targets have {fixed} zeros, so the whole can have a sparsity from "
                f"{(fixed + low) / numel:.4f} to {(fixed + high) / numel:.4f}, not "
                f"{zeros / numel:.4f}. Ask for one of those, or change the map."
            )
        return [([n], count) for n, count in named.items()] + ([(list(others), rest)] if others else [])

    def max_zeros(self, shapes: Shapes, existing: Mapping[str, int]) -> dict[str, int]:
        """What the floor leaves; named targets have their own sparsity instead."""
        most = super().max_zeros(shapes, existing)
        return {n: size if self._given(n) is None else math.prod(shapes[n]) for n, size in most.items()}

    def _given(self, name: str) -> float | None:
        if name in self.sparsities:
            return self.sparsities[name]
        return next((s for glob, s in self.sparsities.items() if fnmatch.fnmatchcase(name, glob)), None)


def _check_room(most: int, zeros: int, allocation: Allocation) -> None:
    require_whole("zeros", zeros, at_least=0)
    if most < zeros:
        raise ConfigError(
            f"min_density={allocation.min_density:g} leaves room for {most} zeros, but the sparsity asks for {zeros}. Lower one of "
            "them."
        )


def apportion(
    wanted: Mapping[str, Fraction], lower: Mapping[str, int], upper: Mapping[str, int], total: int
) -> dict[str, int]:
    """Whole numbers proportional to ``wanted`` within bounds that add up to ``total``; none falls when ``total`` rises.

    The ``k``-th unit of a name is due at the level ``(k - 1/2) / wanted`` (Webster's method); units go out in that order, earlier
    names first, once every name has its lower bound. Largest remainders would not do: with them a larger total can mean
    less for somebody. The level is found exactly: names at a bound are fixed there, until none breaks one.

    Args:
        wanted: Positive.
        lower: At least so many each.
        upper: At most so many each.
        total: ``sum(lower) <= total <= sum(upper)``.
    """
    fixed: dict[str, int] = {}
    while True:
        free = [name for name in wanted if name not in fixed]
        if not free:
            return {name: fixed[name] for name in wanted}
        level = Fraction(total - sum(fixed.values())) / sum(wanted[name] for name in free)
        low = {name: lower[name] for name in free if level * wanted[name] < lower[name]}
        high = {name: upper[name] for name in free if level * wanted[name] > upper[name]}
        if not low and not high:
            break
        excess = sum(low[n] - level * wanted[n] for n in low) - sum(level * wanted[n] - high[n] for n in high)
        fixed.update({**(low if excess >= 0 else {}), **(high if excess <= 0 else {})})
    half = Fraction(1, 2)
    out = {n: min(max(math.floor(level * wanted[n] + half), lower[n]), upper[n]) for n in wanted}
    while sum(out.values()) < total:
        out[min((n for n in out if out[n] < upper[n]), key=lambda n: (out[n] + half) / wanted[n])] += 1
    while sum(out.values()) > total:
        out[max((n for n in reversed(out) if out[n] > lower[n]), key=lambda n: (out[n] - half) / wanted[n])] -= 1
    return out
