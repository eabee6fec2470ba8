"""`Pruner`, `PruningPath` and `PruneResult`: what every pruning method gives."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.errors import ConfigError, PatternError, UnsupportedError
from lightning_cap.fisher.memory_plan import MemoryPlan
from lightning_cap.sparsity.allocation import Allocation, budget_of
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.patterns import Pattern, Unstructured
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.progress import Progress


@dataclass(frozen=True)
class PruneResult:
    """Weights and masks at one sparsity. Nothing in the model changes until it is applied.

    Attributes:
        weights: ``{target: (*shape)}`` in the targets' dtype, zero where pruned.
        masks: ``{target: (*shape)}`` bool, True = kept.
        predicted_loss: Predicted increase of the loss (the pruner's own unit where it has no loss model).
        sparsity: Zeros over all weights of the targets.
        stats: Numbers for logs, such as blocks solved in float64.
    """

    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    predicted_loss: float
    sparsity: float
    stats: Mapping[str, float] = field(default_factory=dict)

    def apply(self, targets: Targets) -> None:
        """Write the weights into the model, in place."""
        targets.restore(self.weights)


class PruningPath(ABC):
    """What one pass over the gradients yields: every sparsity can be read from it. A context manager.

    Attributes:
        nested: Whether a lower sparsity keeps whatever a higher one does.
    """

    nested: bool = True

    def __init__(self, targets: Targets, layout: BlockLayout, masks: Mapping[str, Tensor] | None) -> None:
        self._layout = layout
        self._dtypes = {name: weight.dtype for name, weight in targets.items()}
        self._numel = targets.numel
        self._alive = pack_alive(targets, layout, masks)

    @abstractmethod
    def at(self, sparsity: float) -> PruneResult:
        """Weights and masks with exactly ``floor(sparsity·n + 0.5)`` zeros, those already masked included.

        Raises:
            PatternError: The sparsity is not in [0, 1) or not one that the pattern gives.
        """

    @abstractmethod
    def curve(self, sparsities: Sequence[float]) -> list[float]:
        """Predicted loss increase at each sparsity, without building the weights."""

    def close(self) -> None:  # noqa: B027 - optional
        """Free what the path holds (the Fisher). Using it afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def sparsity(self) -> float:
        """Sparsity before pruning: masked weights over all."""
        return 1 - int(self._alive.sum()) / self._numel

    def _existing(self) -> dict[str, int]:
        return {
            name: size - int(self._alive[span].sum())
            for (name, span), size in zip(self._layout.spans.items(), self._layout.sizes.values(), strict=True)
        }

    def _removals(self, allocation: Allocation, zeros: int) -> list[tuple[list[str], int]]:
        """How many weights of which targets go, beyond those that are zero already."""
        existing = self._existing()
        budgets = allocation.budgets(self._layout.shapes, existing, zeros)
        return [(names, share - sum(existing[name] for name in names)) for names, share in budgets]

    def _most(self, allocation: Allocation) -> dict[str, int] | None:
        """How many weights of each target may go; None without a floor."""
        if not allocation.min_density:
            return None
        existing = self._existing()
        most = allocation.max_zeros(self._layout.shapes, existing)
        return {name: most[name] - existing[name] for name in most}

    def _budget(self, sparsity: float) -> int | None:
        """Zeros in all, or None (with a warning) if the model has more already."""
        zeros = budget_of(sparsity, self._numel)
        existing = self._numel - int(self._alive.sum())
        if existing > zeros:
            warnings.warn(
                f"sparsity={sparsity:g}: the model is already at {self.sparsity:.4g}. Nothing is changed; ask for a higher "
                "sparsity to prune further.",
                stacklevel=3,
            )
            return None
        return zeros

    def _result(self, weights: Tensor, kept: Tensor, predicted_loss: float, stats: Mapping[str, float]) -> PruneResult:
        unpacked = self._layout.unpack(weights)
        return PruneResult(
            weights={name: weight.to(self._dtypes[name]) for name, weight in unpacked.items()},
            masks=self._layout.unpack(kept),
            predicted_loss=predicted_loss,
            sparsity=1 - int(kept.sum()) / self._numel,
            stats=stats,
        )


def pack_alive(targets: Targets, layout: BlockLayout, masks: Mapping[str, Tensor] | None) -> Tensor:
    """``(K, B)`` bool on the targets' device: False on padding and where a mask is.

    Raises:
        ConfigError: As `check_masks`.
    """
    check_masks(targets, masks or {})
    full = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in targets.items()}
    return layout.pack({**full, **(masks or {})}, torch.bool, targets.device)


def check_masks(targets: Targets, masks: Mapping[str, Tensor]) -> None:
    """Refuse masks that are not those of the targets.

    Raises:
        ConfigError: A name is not a target's, or a shape not that of its weight.
    """
    for name, mask in masks.items():
        if name not in targets or mask.shape != targets[name].shape:
            want = f"its weight has {tuple(targets[name].shape)}" if name in targets else "there is no such target"
            raise ConfigError(
                f"masks: {name!r} has shape {tuple(mask.shape)}, but {want}. Give {{target name: bool of the weight's shape}}."
            )


def pack_weights(targets: Targets, layout: BlockLayout, alive: Tensor) -> Tensor:
    """The weights as ``(K, B)``, zero where not ``alive``; float64 if a target is, else float32.

    Raises:
        ConfigError: A weight is not finite.
    """
    weights = targets.weights()
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise ConfigError(f"model: the weight {name!r} is not finite (NaN or inf). Load a sound checkpoint.")
    double = any(weight.dtype == torch.float64 for weight in weights.values())
    packed = layout.pack(weights, torch.float64 if double else torch.float32, alive.device)
    return packed.masked_fill_(~alive, 0.0)


class Pruner(ABC):
    """A pruning method. Subclasses are plain classes; YAML names them by class path.

    Attributes:
        num_gradients: Gradient samples that the method wants, 0 for none.
        samples_per_gradient: Inputs whose mean loss gives one gradient sample.
        predicts_loss: Whether ``predicted_loss`` is an estimate of the increase of the training loss, in its unit.
        num_inputs: Samples whose layer inputs the method wants instead of gradients, 0 for none.
        pattern: Which masks it gives.
        regrows: Whether masked weights may come back: the masks of its results stand in place of those before, a weight that
            comes back is zero in the result, and events are run at a sparsity that is reached already, too.
    """

    num_gradients: int = 0
    samples_per_gradient: int = 1
    num_inputs: int = 0
    predicts_loss: bool = False
    pattern: Pattern = Unstructured()
    regrows: bool = False

    def check(self, targets: Targets) -> None:  # noqa: B027 - optional
        """Refuse targets that do not fit, before anything runs.

        Raises:
            TargetError: A target does not fit the method or its pattern.
        """

    def check_sparsity(self, sparsity: float) -> None:
        """Refuse a sparsity that the method cannot give, before anything runs.

        Raises:
            PatternError: ``sparsity`` is not in [0, 1) or not the pattern's own.
        """
        Unstructured().check_sparsity(sparsity)

    def check_goals(self, targets: Targets, masks: Mapping[str, Tensor] | None, sparsities: Sequence[float]) -> None:
        """Refuse sparsities whose zeros the method's ``allocation`` (if it has one) cannot place, before anything runs.

        Zeros that a run will have made by then are not known; those of ``masks`` stand for them.

        Args:
            targets: The weights.
            masks: As for `path`.
            sparsities: All that the run is to reach, those between two events included. Those that ``masks`` are beyond
                are passed over: they change nothing.

        Raises:
            ConfigError: The zeros of one cannot be placed; it is named.
        """
        allocation = getattr(self, "allocation", None)
        if not isinstance(allocation, Allocation) or self.pattern.sparsity is not None:
            return
        existing = dict.fromkeys(targets, 0) | {name: int((~mask).sum()) for name, mask in (masks or {}).items()}
        goals = [s for s in sparsities if budget_of(s, targets.numel) >= sum(existing.values())]
        check_room(allocation, targets, existing, goals)

    def begin_event(self, done: float) -> None:  # noqa: B027 - optional
        """Hear how far the run is, before each event of a callback.

        Args:
            done: Events of the run that are done, over all of them: 0 at the first one, below 1.
        """

    def plan(self, targets: Targets, masks: Mapping[str, Tensor] | None = None, *, rows_bytes: int = 0) -> MemoryPlan:
        """What `path` will take, and how it will go about it. Every process must call it.

        Args:
            targets: The weights.
            masks: As for `path`.
            rows_bytes: Memory of the gradient rows that the source holds at once.
        """
        return MemoryPlan(targets.device, rows_bytes)

    def state_dict(self) -> dict[str, Any]:
        """Settings that a resumed run must go on with, as plain values; kept in checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Take up the settings of a checkpoint."""

    @abstractmethod
    def path(
        self,
        targets: Targets,
        gradients: GradientSource,
        masks: Mapping[str, Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> PruningPath:
        """Read the gradients and order the weights.

        Args:
            targets: The weights; not changed.
            gradients: Chunks ``{target: (n, *shape)}`` of gradient samples of the mean loss; of layer statistics for a method
                with ``num_inputs``; anything (it is not read) for one that wants neither.
            masks: ``{target: (*shape)}`` bool, False = already pruned and to stay so.
            progress: ``progress(phase, done, total)``.
        """

    def __repr__(self) -> str:
        settings: dict[str, Any] = {k: v for k, v in vars(self).items() if not k.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def refuse_regrowth(pruner: Pruner) -> None:
    """Refuse, for one-shot pruning, a pruner that brings weights back.

    Raises:
        UnsupportedError: It does.
    """
    if pruner.regrows:
        raise UnsupportedError(
            f"pruner={type(pruner).__name__}: weights that it brings back are zero until training goes on, and one-shot pruning "
            "does not train. Run it by CAPPruningCallback, or use Magnitude."
        )


def refuse_splitting(pruner: Pruner, num_recomputations: int) -> None:
    """Refuse several steps to a pattern that has only one sparsity.

    Raises:
        ConfigError: ``num_recomputations`` is above 1.
    """
    if num_recomputations > 1 and pruner.pattern.sparsity is not None:
        raise ConfigError(
            f"num_recomputations={num_recomputations}: {pruner.pattern} has only one sparsity, so the way to it cannot be "
            "split. Leave num_recomputations at 1."
        )


def check_room(
    allocation: Allocation, targets: Targets, existing: Mapping[str, int], sparsities: Sequence[float]
) -> None:
    """Refuse sparsities that an allocation cannot give; ``existing`` zeros of each target stay.

    Raises:
        ConfigError: It names the sparsity.
    """
    shapes = {name: tuple(weight.shape) for name, weight in targets.items()}
    for sparsity in sparsities:
        try:
            allocation.budgets(shapes, existing, budget_of(sparsity, targets.numel))
        except ConfigError as error:
            raise ConfigError(f"sparsity={sparsity:g}: {error}") from error


def in_blocks(pattern: Pattern, method: str) -> Pattern:
    """``pattern`` itself, for a method that works inside blocks of consecutive weights.

    Raises:
        PatternError: Blocks cannot enforce it.
    """
    if not pattern.in_blocks:
        raise PatternError(
            f"pattern={pattern}: {method} works inside blocks of consecutive weights, which do not hold whole rows. Use "
            "DiagonalFisher, GradientTimesWeight, Taylor, Magnitude or Random with it."
        )
    return pattern
