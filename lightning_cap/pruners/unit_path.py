"""What pruning units yields: one order of removal over the whole model, and the weights after any part of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_cap.errors import ConfigError, GradientError
from lightning_cap.pruners.base import Pruner
from lightning_cap.pruners.paths import PruneResult, PruningPath, cast_weight
from lightning_cap.pruners.unit_merge import Removal, UnitOrder, kept_after, prefix
from lightning_cap.sparsity.patterns import Unstructured
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.unit_prices import UnitPrices
from lightning_cap.sparsity.units import units_of
from lightning_cap.utilities.arguments import require_counts, require_list


class UnitSolution:
    """The order of every group, and what becomes of the kept weights: nothing, unless a subclass says so.

    Args:
        orders: ``{group: its order}``.

    Attributes:
        orders: The same.
    """

    def __init__(self, orders: Mapping[str, UnitOrder]) -> None:
        self.orders = orders

    def weights(
        self, targets: Targets, pruned: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """New values of weights, those that change, and numbers for logs. Every process must call it.

        Args:
            targets: The weights as they are.
            pruned: ``{group: bool (size)}`` on the CPU, units that go, of those that are there; only groups with such units.
            masks: ``{target: bool (*shape)}`` afterwards. What is masked is set to zero whatever is returned for it.
        """
        return {}, {}

    def close(self) -> None:
        """Free what is held."""


class UnitPath(PruningPath):
    """The units of a model in one order of removal.

    Args:
        pruner: Whose path it is.
        targets: All weights of units.
        masks: Weights that are pruned already.
        kept: ``{group: bool (size)}`` on the CPU, units that are there.
        prices: What they cost.
        removals: All that can be, in order.
        solution: What becomes of the kept weights.
    """

    def __init__(
        self,
        pruner: Pruner,
        targets: Targets,
        masks: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        prices: UnitPrices,
        removals: Sequence[Removal],
        solution: UnitSolution,
    ) -> None:
        self._cost, self._predicts_loss, self._prices = pruner.cost.name, pruner.predicts_loss, prices
        self._targets, self._units, self._kept = targets, units_of(targets), kept
        self._before = targets.copies()
        self._masks = {
            name: masks[name].to(weight.device, copy=True)
            if name in masks
            else torch.ones_like(weight, dtype=torch.bool)
            for name, weight in self._before.items()
        }
        self._removals, self._solution, self._closed = removals, solution, False
        self._saved = prices.saved_share(counts(kept))

    def __repr__(self) -> str:
        sizes = f"{len(self._before)} targets of {self._targets.numel} weights"
        return f"{type(self).__name__}({sizes}, from sparsity {self.sparsity:.4f})"

    @property
    def sparsity(self) -> float:
        """Masked weights over all, before pruning."""
        return _sparsity(self._masks)

    @property
    def removals(self) -> Sequence[Removal]:
        """All units that can go, in order."""
        return self._removals

    def at(self, sparsity: float) -> PruneResult:
        """Weights and masks with the fewest units of the order removed that save the share ``sparsity`` of the cost.

        Raises:
            PatternError: ``sparsity`` is not in [0, 1).
            ConfigError: It cannot be reached with one unit, and the share ``min_density``, left in each group.
            GradientError: The path is closed.
            UnsupportedError: A weight is beyond the range of its target's type.
        """
        if self._closed:
            raise GradientError("path: it is closed. Ask for every sparsity inside its with block.")
        removals = self._removals[: self._length(sparsity)]
        kept = kept_after(self._kept, removals)
        units = self._units.masks(self._targets.shapes, kept)
        masks = {name: mask & units[name].to(mask.device) for name, mask in self._masks.items()}
        pruned = {name: self._kept[name] & ~kept[name] for name in kept}
        pruned = {name: gone for name, gone in pruned.items() if bool(gone.any())}
        changed, stats = self._solution.weights(self._targets, pruned, masks) if pruned else ({}, {})
        saliency = sum(removal.loss for removal in removals)
        return PruneResult(
            weights=finished({**self._before, **changed}, self._before, masks),
            masks=masks,
            saliency=saliency,
            predicted_loss=saliency if self._predicts_loss else None,
            sparsity=_sparsity(masks),
            stats={"units": len(removals), "saved": self._prices.saved_share(counts(kept)), **stats},
        )

    def curve(self, sparsities: Sequence[float]) -> list[float]:
        """Sums of the losses of the units that go. See `PruningPath.curve`."""
        require_list("sparsities", sparsities, "[0.5, 0.75]")
        return [sum(removal.loss for removal in self._removals[: self._length(s)]) for s in sparsities]

    def scores(self, most: int) -> Tensor:
        """What each unit costs that can go. See `PruningPath.scores`."""
        require_counts(most=most)
        return torch.tensor([removal.loss for removal in self._removals[:: max(1, -(-len(self._removals) // most))]])

    def close(self) -> None:
        """Free what the solution holds. Using the path afterwards is an error."""
        self._closed = True
        self._solution.close()

    def _length(self, sparsity: float) -> int:
        """Units to be removed."""
        Unstructured().check_sparsity(sparsity)
        length = prefix(self._removals, sparsity, self._saved)
        if length is None:
            most = self._removals[-1].saved if self._removals else self._saved
            raise ConfigError(
                f"{self._cost}={sparsity:g}: the units that may go save {most:.4g} of it all. Ask for less, or lower min_density."
            )
        if exceeds(self._prices, counts(self._kept), sparsity):
            warnings.warn(
                f"{self._cost}={sparsity:g}: the model is already at {self._saved:.4g}. Nothing is changed; ask for more to prune "
                "further.",
                stacklevel=3,
            )
        return length


def finished(
    weights: Mapping[str, Tensor], like: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights in the types of ``like``, zero where masked.

    Raises:
        UnsupportedError: One is beyond the range of its type.
    """
    return {
        name: cast_weight(name, weight.masked_fill(~masks[name], 0.0), like[name].dtype)
        for name, weight in weights.items()
    }


def counts(kept: Mapping[str, Tensor]) -> dict[str, int]:
    """Units of each group that are kept."""
    return {name: int(units.sum()) for name, units in kept.items()}


def exceeds(prices: UnitPrices, kept: Mapping[str, int], goal: float) -> bool:
    """Whether so few units save more than ``goal``, by more than what any one unit saves of the whole model."""
    largest = max(prices.saving({}, name) for name in kept) / prices.total
    return prices.saved_share(kept) > goal + max(largest, 1e-9)


def _sparsity(masks: Mapping[str, Tensor]) -> float:
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
