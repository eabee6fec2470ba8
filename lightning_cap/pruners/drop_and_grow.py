"""Drop and grow: sparse training that moves its weights about (RigL, GraNet, SViTE)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_cap.calibration.sources import NO_MEMORY, GradientSource, SourceMemory
from lightning_cap.calibration.statistics import GradientSamples
from lightning_cap.errors import GradientError
from lightning_cap.fisher.memory_plan import MemoryPlan, plan_reading
from lightning_cap.pruners.base import Pruner, check_path_arguments, check_room, require_allocation, require_goals
from lightning_cap.pruners.paths import PruneResult, WeightPath, pack_weights, some_scores
from lightning_cap.pruners.row_mean import RowMean, temporary_bytes
from lightning_cap.solver.ranking import select, smallest
from lightning_cap.sparsity.allocation import Allocation, Global
from lightning_cap.sparsity.masks import check_masks
from lightning_cap.sparsity.patterns import Unstructured
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities.arguments import require_counts, require_list, require_real
from lightning_cap.utilities.decimals import as_written
from lightning_cap.utilities.progress import Progress

_LARGEST_FLOAT = 0x7F7FFFFF  # bits of the largest finite float32
_BYTES = 83  # a weight: gradient sum 8, weights 12, scores 12, places of a group 8, sorting 36, masks 7


@dataclass(kw_only=True, eq=False)
class DropAndGrow(Pruner):
    """Drop the weights of least ``|w|`` and grow as many of largest mean gradient (RigL, Evci et al. 2020, algorithm 1).

    At an event with the goal ``s``, each budget of the allocation drops weights until it has its zeros and
    ``f · (kept at s)`` more, then takes as many back: those of largest ``|mean gradient|`` among all that are not kept. A
    weight that comes back is zero; one that was dropped a moment before simply stays as it was. The fraction falls by a cosine
    over the run, ``f = drop_fraction / 2 · (1 + cos(π · done))``. Where nothing is masked yet, nothing grows.

    With `RepeatedSchedule` this is RigL (on vision transformers, SViTE, Chen et al. 2021); with a rising one, such as
    `PolynomialSchedule`, GraNet (Liu et al. 2021). Run it by the callback: what grows is worth something only if training goes
    on.

    Args:
        drop_fraction: Kept weights that are exchanged at the first event, as a share; in [0, 1). At 0 weights grow only if the
            sparsity falls.
        num_gradients: Gradient samples for the mean.
        samples_per_gradient: Inputs in one of them. Many inputs in few samples are fast, since only the mean is used.
        allocation: How zeros are shared out over the targets; weights are exchanged within a budget. Zeros that are there do
            not bind it.

    Raises:
        ConfigError: An argument is out of range.
    """

    drop_fraction: float = 0.3
    num_gradients: int = 16
    samples_per_gradient: int = 32
    allocation: Allocation = Global()
    _done: float = field(default=0.0, init=False, repr=False)

    regrows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_real("drop_fraction", self.drop_fraction, "[0, 1)", example=0.3)
        require_allocation(self.allocation)
        require_counts(num_gradients=self.num_gradients, samples_per_gradient=self.samples_per_gradient)

    @property
    def statistic(self) -> GradientSamples:
        """Gradient rows."""
        return GradientSamples(self.num_gradients, self.samples_per_gradient)

    def begin_event(self, done: float) -> None:
        """The cosine is taken at ``done``; see `Pruner.begin_event`."""
        super().begin_event(done)
        self._done = done

    @property
    def fraction(self) -> float:
        """Share of the kept weights that the next event exchanges."""
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * self._done))

    def check(self, targets: Targets) -> None:
        """Refuse targets that the allocation does not know."""
        require_targets(targets)
        self.allocation.check(targets.blocks(1).shapes)

    def check_goals(self, targets: Targets, masks: Mapping[str, Tensor] | None, sparsities: Sequence[float]) -> None:
        """Zeros that are there do not bind. See `Pruner.check_goals`."""
        require_goals(targets, masks, sparsities)
        check_room(self, targets, dict.fromkeys(targets, 0), sparsities)

    def plan(
        self, targets: Targets, masks: Mapping[str, Tensor] | None = None, *, source: SourceMemory = NO_MEMORY
    ) -> MemoryPlan:
        """See `Pruner.plan`."""
        require_targets(targets)
        check_masks(targets, masks)
        return plan_reading(
            targets.device, source, 13 * targets.numel, temporary_bytes(targets), _BYTES * targets.numel
        )

    def path(
        self,
        targets: Targets,
        gradients: GradientSource,
        masks: Mapping[str, Tensor] | None = None,
        *,
        progress: Progress | None = None,
    ) -> DropAndGrowPath:
        """Average the gradients, over all processes; they are not read where nothing is masked. See `Pruner.path`.

        Raises:
            GradientError: Weights are masked, and there is no gradient to choose among them by.
        """
        check_path_arguments(targets, gradients, progress)
        return DropAndGrowPath(self, targets, gradients, masks)


class DropAndGrowPath(WeightPath):
    """Weights and mean gradients, from which the masks at any sparsity, higher or lower than now, can be read."""

    def __init__(
        self, pruner: DropAndGrow, targets: Targets, gradients: GradientSource, masks: Mapping[str, Tensor] | None
    ) -> None:
        super().__init__(targets, targets.blocks(1), masks, pruner.cost, pruner.predicts_loss)
        self._allocation, self._fraction = pruner.allocation, pruner.fraction
        self._weights = pack_weights(targets, self._layout, self._alive)
        self._gradient: Tensor | None = None
        if not bool(self._alive.all()):
            self._gradient = self._layout.pack(_mean(targets, gradients), torch.float32, self._alive.device).abs_()

    def at(self, sparsity: float) -> PruneResult:
        """See `PruningPath.at`; masked weights come back. ``saliency`` is half the squared norm of what is dropped."""
        kept = self._kept(sparsity)
        grown = int((kept & ~self._alive).sum())
        stats = {"dropped": float((self._alive & ~kept).sum()), "grown": float(grown)}
        return self._result(self._weights.masked_fill(~kept, 0.0), kept, self._dropped(kept), stats)

    def curve(self, sparsities: Sequence[float]) -> list[float]:
        """Half the squared norm of what each sparsity drops."""
        require_list("sparsities", sparsities, "[0.5, 0.75]")
        return [self._dropped(self._kept(sparsity)) for sparsity in sparsities]

    def scores(self, most: int) -> Tensor:
        """Magnitudes. See `PruningPath.scores`."""
        return some_scores(self._weights, self._alive, most).abs()

    def _kept(self, sparsity: float) -> Tensor:
        """``(K, 1)`` bool, exactly ``floor(sparsity·n + 0.5)`` of them False."""
        Unstructured().check_sparsity(sparsity)
        kept = torch.empty_like(self._alive)
        free = dict.fromkeys(self._layout.shapes, 0)  # zeros that are there may come back
        goal = self._cost.budget(sparsity, self._cost.total(self._layout.shapes))
        for names, zeros in self._allocation.budgets(self._layout.shapes, free, goal):
            spans = [self._layout.spans[name] for name in names]
            together = torch.cat([torch.arange(span.start, span.stop, device=kept.device) for span in spans])
            kept[together] = self._exchange(names, together, zeros)
        return kept

    def _exchange(self, names: list[str], together: Tensor, zeros: int) -> Tensor:
        """What the targets of one budget keep: bool ``(len(together), 1)``."""
        alive = self._alive[together]
        masked = len(together) - int(alive.sum())
        exchanged = int(as_written(self._fraction) * (len(together) - zeros)) if masked else 0
        existing = self._existing()
        most = self._allocation.max_zeros(self._layout.shapes, existing)
        room = {name: most[name] - existing[name] for name in names}
        dropped = min(max(0, zeros + exchanged - masked), sum(room.values()))
        magnitude = self._weights[together].abs().masked_fill_(~alive, torch.inf)
        places = torch.arange(len(together), device=alive.device).split([self._layout.sizes[name] for name in names])
        floors = room if self._allocation.min_density else None
        kept = alive & ~select(magnitude, dict(zip(names, places, strict=True)), [(names, dropped)], floors)
        if self._gradient is not None and masked + dropped > zeros:
            kept |= _largest(self._gradient[together], ~kept, masked + dropped - zeros)
        return kept

    def _dropped(self, kept: Tensor) -> float:
        return float(torch.where(kept, 0.0, self._weights).square().sum(dtype=torch.float64)) / 2


def _mean(targets: Targets, gradients: GradientSource) -> dict[str, Tensor]:
    """``{target: (*shape)}`` float64 mean of the gradient rows of all processes; every process must call it."""
    means = RowMean(lambda rows: rows).over(targets, gradients)
    broken = [name for name, mean in means.items() if not bool(torch.isfinite(mean).all())]
    if broken:
        raise GradientError(f"gradients: those of {broken[0]!r} are not finite (NaN or inf). Leave such samples out.")
    return means


def _largest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest of the float32 ``scores``, none negative, where ``among``; ties go to the earlier one."""
    turned = (_LARGEST_FLOAT - scores.view(torch.int32)).view(torch.float32)  # the same numbers in the opposite order
    return smallest(turned.masked_fill_(~among, torch.inf), count)
