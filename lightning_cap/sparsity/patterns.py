"""Which masks are allowed: unstructured, N of every M consecutive inputs, whole groups of inputs, or whole output rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_cap.errors import PatternError
from lightning_cap.sparsity.masks import check_masks
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities.arguments import is_whole, require_instance, require_real, require_whole, shown


class Pattern(ABC):
    """A constraint on masks, checked and enforced on the block view ``(k, B)``."""

    @property
    @abstractmethod
    def group_size(self) -> int:
        """Consecutive weights (in the layout) that are constrained together; 1 if weights are free."""

    @property
    def kept_in_group(self) -> int | None:
        """The rule of the compiled solvers: a weight may be pruned while more than this many of its group are alive.

        None (the default of a new pattern) if that is not the whole rule; its blocks are then solved by the torch
        backend, which asks `removable`, unless whole groups are pruned together.
        """
        return None

    @property
    def whole_groups(self) -> bool:
        """Whether the weights of a group are pruned together."""
        return False

    @property
    def in_blocks(self) -> bool:
        """Whether a block of consecutive weights is enough to enforce it."""
        return True

    @property
    @abstractmethod
    def sparsity(self) -> float | None:
        """The one sparsity that the pattern gives, or None if any can be had."""

    @abstractmethod
    def removable(self, alive: Tensor) -> Tensor:
        """The weights that may be removed next.

        Args:
            alive: ``(k, B)`` bool, the weights not yet removed; False on padding and on masked weights.

        Returns:
            ``(k, B)`` bool, a subset of ``alive``.
        """

    def lowest_scores(self, scores: Tensor, alive: Tensor) -> Tensor:
        """Prune every group as far as the pattern demands, one weight of lowest score at a time.

        Args:
            scores: ``(k, B)``.
            alive: ``(k, B)`` bool.

        Returns:
            ``(k, B)`` bool, a subset of ``alive``.
        """
        size = self.group_size
        values, left = scores.reshape(-1, size), alive.reshape(-1, size).clone()
        for _ in range(size):
            removable = self.removable(left)
            lowest = values.masked_fill(~removable, torch.inf).argmin(-1, keepdim=True)
            left.scatter_(1, lowest, left.gather(1, lowest) & ~removable.gather(1, lowest))
        return alive & ~left.view(alive.shape)

    @abstractmethod
    def is_satisfied(self, kept: Tensor) -> bool:
        """Whether a finished mask ``kept`` ``(K, B)`` (False on padding) obeys the pattern."""

    def units(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The weights that are pruned together.

        Args:
            rows: ``(k, B)``, the blocks of one target.
            shape: Of the target.

        Returns:
            A view ``(U, size)``; one weight a unit unless the pattern says otherwise.
        """
        return rows.reshape(-1, self.group_size if self.whole_groups else 1)

    def count_violations(self, kept: Tensor, shape: tuple[int, ...]) -> int:
        """How many units of a target's finished mask ``(k, B)`` (False on padding) break the pattern."""
        groups = kept.reshape(-1, self.group_size)
        return sum(not self.is_satisfied(group.unsqueeze(0)) for group in groups) if not self.is_satisfied(kept) else 0

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse a sparsity that the pattern cannot give.

        Raises:
            PatternError: ``sparsity`` is not in [0, 1), or not the pattern's own.
        """
        require_real("sparsity", sparsity, "[0, 1)", example=0.75, error=PatternError)
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
        """0: the last weight may be pruned too."""
        return 0

    @property
    def sparsity(self) -> None:
        """None: any sparsity can be had."""
        return

    def removable(self, alive: Tensor) -> Tensor:
        """All that are alive."""
        return alive

    def is_satisfied(self, kept: Tensor) -> bool:
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
            if not is_whole(value):
                raise PatternError(f"{name}={shown(value)}: give a whole number. {how_to_write(value)}")
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

    def removable(self, alive: Tensor) -> Tensor:
        """The alive weights of groups that have more than ``n`` of them."""
        groups = alive.reshape(*alive.shape[:-1], -1, self.m)
        return (groups & (groups.sum(-1, keepdim=True) > self.n)).view_as(alive)

    def is_satisfied(self, kept: Tensor) -> bool:
        """Whether no group keeps more than ``n``."""
        return self.count_violations(kept, ()) == 0

    def count_violations(self, kept: Tensor, shape: tuple[int, ...]) -> int:
        """Groups that keep more than ``n``."""
        return int((kept.reshape(-1, self.m).sum(-1) > self.n).sum())


class _Together(Pattern):
    """Weights are pruned in whole units, any number of them."""

    @property
    def whole_groups(self) -> bool:
        """True: the weights of a unit are pruned together."""
        return True

    @property
    def sparsity(self) -> None:
        """None: any sparsity of whole units can be had."""
        return

    def removable(self, alive: Tensor) -> Tensor:
        """All that are alive; solvers remove a unit at a time."""
        return alive

    def is_satisfied(self, kept: Tensor) -> bool:
        """Whether every unit is kept or pruned as a whole."""
        return self.count_violations(kept, tuple(kept.shape)) == 0

    def count_violations(self, kept: Tensor, shape: tuple[int, ...]) -> int:
        """Units that are kept in part."""
        units = self.units(kept.reshape(-1)[: torch.Size(shape).numel()], shape)
        return int((units.any(-1) & ~units.all(-1)).sum())


@dataclass(frozen=True)
class BlockOf(_Together):
    """Groups of ``n`` consecutive inputs of an output row are pruned or kept together, 4 by default ("block-4" of Kurtic et al.
    2022).

    Groups lie as those of `NofM`. As many groups are pruned as each budget of the allocation has room for (with `Global`, the
    total).

    Args:
        n: Weights in a group, at least 2.

    Raises:
        PatternError: ``n`` is not such a number.
    """

    n: int = 4

    def __post_init__(self) -> None:
        require_whole("n", self.n, at_least=2, example=4, error=PatternError)

    @property
    def group_size(self) -> int:
        """``n``."""
        return self.n


@dataclass(frozen=True)
class OutputRows(_Together):
    """Whole output rows: neurons of a Linear layer, output channels of a convolution (structured pruning).

    Rows are compared by their mean saliency per weight; rows of all targets compete, unless the allocation says otherwise.
    Shapes do not change: a row of zeros stays in the model.
    """

    @property
    def group_size(self) -> int:
        """1: any flattening will do."""
        return 1

    @property
    def in_blocks(self) -> bool:
        """No: a row may span many blocks."""
        return False

    def units(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Output rows, ``(O, weights in a row)``, of blocks without padding."""
        return rows.reshape(shape[0], -1)


if TYPE_CHECKING:
    PatternArgument = Any
else:
    #: A pattern, or None for `Unstructured`. Numbers and strings, as YAML makes them of ``2:4``, are let in so that
    #: `as_pattern` can say how to write it.
    PatternArgument = Pattern | int | str | None


def check_pattern(targets: Targets, pattern: Pattern, masks: Mapping[str, Tensor] | None = None) -> None:
    """Verify a whole model: every target's zeros obey the pattern.

    Args:
        targets: The weights, e.g. ``Targets.from_model(model)``.
        pattern: What they are to obey.
        masks: ``{target: (*shape)}`` bool to look at instead of the zeros of the weights.

    Raises:
        PatternError: Some do not; the message counts them.
        ConfigError: ``targets`` or ``masks`` are none.
        TargetError: A target does not fit the pattern.
    """
    require_targets(targets)
    require_instance("pattern", pattern, Pattern, "NofM(2, 4)", error=PatternError)
    check_masks(targets, masks, all_of_them=True)
    layout = targets.blocks(pattern.group_size, pattern.group_size)
    kept = masks or {name: weight != 0 for name, weight in targets.weights().items()}
    packed = layout.pack({name: kept[name] for name in targets}, torch.bool, targets.device)
    counts = {n: pattern.count_violations(packed[span], layout.shapes[n]) for n, span in layout.spans.items()}
    bad = {name: count for name, count in counts.items() if count}
    if bad:
        first = ", ".join(f"{name!r} ({count})" for name, count in list(bad.items())[:4])
        raise PatternError(
            f"pattern: {sum(bad.values())} groups in {len(bad)} of {len(counts)} targets break {pattern}: {first}"
            f"{', ...' if len(bad) > 4 else ''}. Prune the model with this pattern, or check against the one it was pruned with."
        )


def how_to_write(value: object) -> str:
    """What to write in Python and YAML instead of ``2:4``, which YAML reads as the base-60 number 124."""
    advice = (
        "In Python write NofM(n=2, m=4); in YAML {class_path: lightning_cap.sparsity.NofM, init_args: {n: 2, m: 4}}."
    )
    if isinstance(value, int) and value >= 60:
        return f"{value} is what YAML makes of an unquoted {value // 60}:{value % 60} (a base-60 number). {advice}"
    return advice


def as_pattern(value: object) -> Pattern:
    """``value`` itself if it is a pattern, unstructured for None.

    Raises:
        PatternError: ``value`` is something else, such as the 124 that YAML makes of ``2:4``.
    """
    if value is None:
        return Unstructured()
    if isinstance(value, (Pattern, type)):
        require_instance("pattern", value, Pattern, "NofM(2, 4)", error=PatternError)
        return cast(Pattern, value)
    raise PatternError(f"pattern={shown(value)}: this is no pattern. {how_to_write(value)}")
