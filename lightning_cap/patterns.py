"""Which masks are allowed: unstructured, or N of every M consecutive inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from lightning_cap.errors import PatternError


class Pattern(ABC):
    """A constraint on masks, checked and enforced on the block view ``(k, B)``."""

    @property
    @abstractmethod
    def group_size(self) -> int:
        """Consecutive weights (in the layout) that are constrained together; 1 if weights are free."""

    @property
    def kept_in_group(self) -> int | None:
        """The rule of the compiled solvers: a weight may go while more than this many of its group are alive.

        None (the default of a new pattern) if that is not the whole rule; its blocks are then solved by the torch
        backend, which asks `candidates`.
        """
        return None

    @property
    @abstractmethod
    def sparsity(self) -> float | None:
        """The one sparsity that the pattern gives, or None if any can be had."""

    @abstractmethod
    def candidates(self, alive: Tensor) -> Tensor:
        """The weights that may be removed next.

        Args:
            alive: ``(k, B)`` bool, the weights not yet removed; False on padding and on masked weights.

        Returns:
            ``(k, B)`` bool, a subset of ``alive``.
        """

    @abstractmethod
    def holds(self, kept: Tensor) -> bool:
        """Whether a finished mask ``kept`` ``(K, B)`` (False on padding) obeys the pattern."""

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse a sparsity that the pattern cannot give.

        Raises:
            PatternError: ``sparsity`` is not in [0, 1), or not the pattern's own.
        """
        if not 0 <= sparsity < 1:
            raise PatternError(f"sparsity={sparsity}: give a fraction of zeros in [0, 1), such as 0.75 for 75 %.")
        if self.sparsity is not None and abs(sparsity - self.sparsity) > 1e-6:
            raise PatternError(
                f"sparsity={sparsity}: {self} gives {self.sparsity:g} alone. Ask for sparsity={self.sparsity:g}."
            )


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight is free."""

    @property
    def group_size(self) -> int:
        """1: weights are free."""
        return 1

    @property
    def kept_in_group(self) -> int:
        """0: the last weight may go too."""
        return 0

    @property
    def sparsity(self) -> None:
        """None: any sparsity can be had."""
        return

    def candidates(self, alive: Tensor) -> Tensor:
        """All that are alive."""
        return alive

    def holds(self, kept: Tensor) -> bool:
        """Always."""
        return True


@dataclass(frozen=True)
class NofM(Pattern):
    """At most ``n`` weights kept in each group of ``m`` consecutive inputs of an output row (2:4 by default).

    Groups lie along dim 1 of Linear and Conv weights; for a convolution over input channels at one kernel
    position, as sparse hardware reads them (Mishra et al. 2021; the paper's appendix H).

    Args:
        n: Weights kept in a group, 1 <= n < m.
        m: Weights in a group.

    Raises:
        PatternError: Not two integers with 1 <= n < m.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("m", self.m)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise PatternError(f"{name}={value!r}: give two integers. {how_to_write(value)}")
        if (self.n, self.m) == (2, 124):  # "m: 2:4"
            raise PatternError(f"m={self.m}: {how_to_write(self.m)}")
        if not 1 <= self.n < self.m:
            raise PatternError(
                f"n={self.n}, m={self.m}: a group of m weights keeps n of them, 1 <= n < m. {how_to_write(self.n)}"
            )

    def __str__(self) -> str:
        return f"NofM(n={self.n}, m={self.m})"

    @property
    def group_size(self) -> int:
        """``m``."""
        return self.m

    @property
    def kept_in_group(self) -> int:
        """``n``."""
        return self.n

    @property
    def sparsity(self) -> float:
        """``1 - n/m``."""
        return 1 - self.n / self.m

    def candidates(self, alive: Tensor) -> Tensor:
        """The alive weights of groups that have more than ``n`` of them."""
        groups = alive.reshape(*alive.shape[:-1], -1, self.m)
        return (groups & (groups.sum(-1, keepdim=True) > self.n)).view_as(alive)

    def holds(self, kept: Tensor) -> bool:
        """Whether no group keeps more than ``n``."""
        return bool((kept.reshape(*kept.shape[:-1], -1, self.m).sum(-1) <= self.n).all())


def how_to_write(value: object) -> str:
    """What to write in Python and YAML instead of ``2:4``, which YAML reads as the base-60 number 124."""
    advice = (
        "In Python write NofM(n=2, m=4); in YAML {class_path: lightning_cap.patterns.NofM, init_args: {n: 2, m: 4}}."
    )
    if isinstance(value, int) and value >= 60:
        return f"{value} is what YAML makes of an unquoted {value // 60}:{value % 60} (a base-60 number). {advice}"
    return advice


def as_pattern(value: Pattern | int | str | None) -> Pattern:
    """``value`` itself if it is a pattern, unstructured for None.

    Raises:
        PatternError: ``value`` is a number or string, such as the 124 that YAML makes of ``2:4``.
    """
    if value is None:
        return Unstructured()
    if isinstance(value, Pattern):
        return value
    raise PatternError(f"pattern={value!r} is not a pattern. {how_to_write(value)}")
