"""What pruning yields: a `PruningPath`, from which every sparsity can be read, and the `PruneResult` at one."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_cap.errors import ConfigError, UnsupportedError
from lightning_cap.sparsity.allocation import Allocation
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.cost import Cost, Parameters
from lightning_cap.sparsity.masks import check_masks
from lightning_cap.sparsity.shards import BlockShards
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_counts, shown
from lightning_cap.utilities.sharded import as_shard, local, part_of


@dataclass(frozen=True)
class PruneResult:
    """Weights and masks at one sparsity. Nothing in the model changes until it is applied.

    Attributes:
        weights: ``{target: (*shape)}`` in the targets' dtype, zero where pruned; sharded as these are.
        masks: ``{target: (*shape)}`` bool, True = kept; sharded as the targets are.
        saliency: Sum of the saliencies of what was pruned, in the pruner's own unit.
        sparsity: Zeros over all weights of the targets.
        predicted_loss: Predicted increase of the loss: ``saliency``, if that is one (`Pruner.predicts_loss`), else None.
        stats: Numbers for logs, such as blocks solved in float64.
    """

    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    saliency: float
    sparsity: float
    predicted_loss: float | None = None
    stats: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Short: no tensors."""
        numel = sum(weight.numel() for weight in self.weights.values())
        predicted = "" if self.predicted_loss is None else f"predicted_loss={self.predicted_loss:.4g}, "
        plural = "s" if len(self.weights) > 1 else ""
        return f"PruneResult(sparsity={self.sparsity:.4f}, {predicted}{len(self.weights)} target{plural} of {numel} weights)"

    def apply(self, targets: Targets) -> None:
        """Write the weights into the model, in place.

        Raises:
            ConfigError: ``targets`` are not those that the result is of.
        """
        require_targets(targets)
        shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        if shapes != targets.shapes:
            raise ConfigError(
                f"targets={shown(targets)}: they are not those of {self!r}. Apply it to the model that was pruned."
            )
        targets.restore(self.weights)


class PruningPath(ABC):
    """What one pass over the gradients yields: every sparsity can be read from it. A context manager.

    Attributes:
        nested: Whether a lower sparsity keeps whatever a higher one does.
    """

    nested: bool = True

    @property
    @abstractmethod
    def sparsity(self) -> float:
        """Sparsity before pruning: masked weights over all."""

    @abstractmethod
    def at(self, sparsity: float) -> PruneResult:
        """Weights and masks with exactly ``floor(sparsity·n + 0.5)`` zeros, those already masked included.

        Of a pruner of units: with the fewest units pruned, in its order, that save this share of its cost.

        Raises:
            PatternError: The sparsity is not in [0, 1) or not one that the pattern gives.
            UnsupportedError: A reconstructed weight is beyond the range of its target's type.
        """

    def candidates(self, sparsity: float) -> tuple[PruneResult, ...]:
        """The results at a sparsity among which a measured loss should choose; the first one is that of `at`.

        Most paths have one. Every process must call it.

        Raises:
            PatternError: As `at`.
            UnsupportedError: As `at`.
        """
        return (self.at(sparsity),)

    @abstractmethod
    def curve(self, sparsities: Sequence[float]) -> list[float]:
        """Summed saliency at each sparsity, without building the weights: `PruneResult.saliency`.

        Of a pruner with ``predicts_loss`` this is the predicted increase of the loss; of another it is not one.
        """

    def scores(self, most: int) -> Tensor | None:
        """Some of the scores that this process has ranked by what is not pruned yet, for logs: ``(n,)``; None for none.

        Args:
            most: Of them, at the most; evenly spaced ones, where there are more.

        Raises:
            ConfigError: ``most`` is no whole number of at least 1.
        """
        require_counts(most=most)
        return None

    def close(self) -> None:  # noqa: B027 - optional
        """Free what the path holds (the Fisher). Using it afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WeightPath(PruningPath):
    """A path of single weights, in the blocks of a layout.

    Of sharded targets each process has the blocks that it owns, and no others.

    Args:
        targets: The weights.
        layout: Their block view, of all blocks.
        masks: Weights that are pruned already.
        cost: What a goal counts.
        predicts_loss: See `Pruner`.
    """

    def __init__(
        self,
        targets: Targets,
        layout: BlockLayout,
        masks: Mapping[str, Tensor] | None,
        cost: Cost | None = None,
        predicts_loss: bool = False,
    ) -> None:
        self._shards = BlockShards(targets, layout) if targets.is_sharded else None
        self._cost, self._predicts_loss = cost or Parameters(), predicts_loss
        self._layout = layout if self._shards is None else self._shards.own
        self._shapes = layout.shapes
        self._dtypes = {name: weight.dtype for name, weight in targets.items()}
        self._numel = targets.numel
        self._alive = pack_alive(targets, layout, masks, self._shards)
        alive = self._of_all([self._alive[span].sum() for span in self._layout.spans.values()])
        self._zeros = {n: size - left for (n, size), left in zip(layout.sizes.items(), alive, strict=True)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._dtypes)} targets of {self._numel} weights, from sparsity {self.sparsity:.4f})"

    @property
    def sparsity(self) -> float:
        """Sparsity before pruning: masked weights over all."""
        return 1 - (self._numel - sum(self._zeros.values())) / self._numel

    def _existing(self) -> dict[str, int]:
        return dict(self._zeros)

    def _of_all(self, counts: Sequence[Tensor]) -> list[int]:
        """Counts over all blocks, of those over the blocks that are here."""
        found = torch.stack(list(counts))
        return [int(n) for n in (found if self._shards is None else distributed.sum_over_ranks(found)).tolist()]

    def _removals(self, allocation: Allocation, zeros: int) -> list[tuple[list[str], int]]:
        """How many weights of which targets are pruned, beyond those that are zero already."""
        existing = self._existing()
        budgets = allocation.budgets(self._shapes, existing, zeros)
        return [(names, share - sum(existing[name] for name in names)) for names, share in budgets]

    def _most(self, allocation: Allocation) -> dict[str, int] | None:
        """How many weights of each target may be pruned; None without a floor."""
        if not allocation.min_density:
            return None
        existing = self._existing()
        most = allocation.max_zeros(self._shapes, existing)
        return {name: most[name] - existing[name] for name in most}

    def _budget(self, sparsity: float) -> int | None:
        """Zeros in all, or None (with a warning) if the model has more already."""
        total = self._cost.total(self._shapes)
        if self._cost.is_exceeded(sparsity, self._cost.saved(self._shapes, self._existing()), total):
            warnings.warn(
                f"sparsity={sparsity:g}: the model is already at {self.sparsity:.4g}. Nothing is changed; ask for a higher "
                "sparsity to prune further.",
                stacklevel=3,
            )
            return None
        return self._cost.budget(sparsity, total)

    def _result(self, weights: Tensor, kept: Tensor, saliency: float, stats: Mapping[str, float]) -> PruneResult:
        unpack = self._layout.unpack if self._shards is None else self._shards.unpack
        unpacked = unpack(weights)
        with distributed.raise_on_all_ranks("Writing the weights") if self._shards is not None else nullcontext():
            cast = {name: cast_weight(name, weight, self._dtypes[name]) for name, weight in unpacked.items()}
        return PruneResult(
            weights=cast,
            masks=unpack(kept),
            saliency=saliency,
            predicted_loss=saliency if self._predicts_loss else None,
            sparsity=1 - self._of_all([kept.sum()])[0] / self._numel,
            stats=stats,
        )


def some_scores(scores: Tensor, ranked: Tensor, most: int) -> Tensor:
    """At most so many of those scores ``(K, B)`` that are ``ranked``, evenly spaced, so that nothing as large is made."""
    require_counts(most=most)
    step = max(1, -(-scores.numel() // most))
    while math.gcd(step, scores.shape[-1]) > 1 < step:  # else it may meet the same column of every block
        step += 1
    return scores.reshape(-1)[::step][ranked.reshape(-1)[::step]]


def cast_weight(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A target's new weights in its own type. They are the same on every process, or shards of which one may be refused."""
    part = local(weight)
    cast = part.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise UnsupportedError(
            f"target {name!r}: a reconstructed weight of {float(part.abs().max()):.6g} is beyond {torch.finfo(dtype).max:.6g}, "
            f"the largest number of {dtype}. Nothing is changed. Raise damp, or prune the model in float32 or bfloat16."
        )
    return as_shard(cast, weight)


def pack_alive(
    targets: Targets, layout: BlockLayout, masks: Mapping[str, Tensor] | None, shards: BlockShards | None = None
) -> Tensor:
    """``(K, B)`` bool on the targets' device: False on padding and where a mask is; ``(K_r, B)`` of sharded targets.

    Raises:
        ConfigError: As `check_masks`.
    """
    check_masks(targets, masks)
    if shards is not None:
        full = {n: as_shard(torch.ones_like(local(w), dtype=torch.bool), w) for n, w in targets.weights().items()}
        given = {n: as_shard(part_of(mask, full[n]), full[n]) for n, mask in (masks or {}).items()}
        return shards.pack({**full, **given}, torch.bool)
    full = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in targets.items()}
    return layout.pack({**full, **(masks or {})}, torch.bool, targets.device)


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        ConfigError: One is; its target is named.
    """
    for name, weight in weights.items():
        if not bool(torch.isfinite(local(weight)).all()):
            raise ConfigError(f"model: the weight {name!r} is not finite (NaN or inf). Load a sound checkpoint.")


def pack_weights(targets: Targets, layout: BlockLayout, alive: Tensor, shards: BlockShards | None = None) -> Tensor:
    """The weights as ``(K, B)``, zero where not ``alive``; float64 if a target is, else float32; ``(K_r, B)`` of sharded ones.

    Raises:
        ConfigError: A weight is not finite.
    """
    weights = targets.weights()
    with distributed.raise_on_all_ranks("Reading the weights") if shards is not None else nullcontext():
        check_finite(weights)
    double = any(weight.dtype == torch.float64 for weight in weights.values())
    dtype = torch.float64 if double else torch.float32
    packed = layout.pack(weights, dtype, alive.device) if shards is None else shards.pack(weights, dtype)
    return packed.masked_fill_(~alive, 0.0)
