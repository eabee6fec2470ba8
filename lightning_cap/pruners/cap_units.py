"""CAP for units: the Optimal Brain Surgeon on gates that multiply the units' outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.calibration.unit_samples import MeasuringSource, UnitSamples, measuring
from lightning_cap.pruners.unit_compensation import best, compensate
from lightning_cap.pruners.unit_merge import UnitOrder
from lightning_cap.pruners.unit_path import UnitSolution, finished
from lightning_cap.pruners.unit_scores import mean_over_gates
from lightning_cap.pruners.units import UnitPruner
from lightning_cap.solver import eliminate, reconstruct
from lightning_cap.sparsity.patterns import Unstructured
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import UnitGroup, consumers_of, units_of
from lightning_cap.utilities.arguments import require_counts, require_flag, require_real
from lightning_cap.utilities.progress import Progress


@dataclass(kw_only=True, eq=False)
class CAPUnits(UnitPruner):
    """Optimal Brain Surgeon on the units of every group, one at a time, merged over the model by loss per price.

    A gate of value 1 multiplies the output of each unit. The empirical Fisher over all gates of a group is full, ``F = damp·I +
    (1/N) Σ g gᵀ`` (equation 3 with gates for weights), so that units that do the same are not removed together. The other gates are
    set to what is best for the loss, and folded into the weights that they multiply. Where that has a lower loss on the calibration
    samples, the layers that read pruned units are instead fitted by least squares to what they gave before, ``argmin ‖X W - X_kept
    W'‖²``, from the inputs that they have left.

    Args:
        num_gradients: Gradient samples, ``N``.
        samples_per_gradient: Inputs whose mean loss gives one gradient sample.
        compensate: Try the fit by least squares. It takes two more passes over the samples, and its loss a third. Not for sources
            that hold gradients alone.
        num_inputs: Samples for that: their layer inputs, and the losses that decide.
        ridge: Added to the diagonal of ``X Xᵀ`` for that, as a fraction of its mean.
        damp: Added to the diagonal of a group's Fisher, as a fraction of its mean: gradients of gates differ by orders of magnitude
            between groups and models.
        cost: What a goal counts. See `UnitPruner`.
        allocation: How units are shared out over the groups. See `UnitPruner`.

    Raises:
        ConfigError: An argument is out of range.
    """

    num_gradients: int = 1024
    samples_per_gradient: int = 1
    damp: float = 0.01
    compensate: bool = True
    num_inputs: int = 1024
    ridge: float = 1e-3

    predicts_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(num_gradients=self.num_gradients, samples_per_gradient=self.samples_per_gradient)
        require_counts(num_inputs=self.num_inputs)
        require_flag("compensate", self.compensate)
        require_real("damp", self.damp, "(0, inf)", example=0.01)
        require_real("ridge", self.ridge, "(0, inf)", example=1e-3)

    @property
    def statistic(self) -> UnitSamples:
        """Gradients of gates, and what the fit reads."""
        return UnitSamples(self.num_gradients, self.samples_per_gradient, self.num_inputs if self.compensate else 0)

    def held_bytes(self, targets: Targets) -> int:
        """The moments of layer inputs."""
        if not self.compensate:
            return 0
        return 8 * sum(weight[0].numel() ** 2 for weight in consumers_of(targets).values())

    def _solve(
        self,
        targets: Targets,
        masks: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        gradients: GradientSource,
        progress: Progress | None,
    ) -> UnitSolution:
        units = units_of(targets)
        fishers, _ = mean_over_gates(targets, units, gradients, lambda rows: rows.T @ rows)
        solved = {}
        for number, name in enumerate(units):
            solved[name] = GateFisher(fishers.pop(name), kept[name], self.damp)
            if progress is not None:
                progress("solve", number + 1, len(units))
        source = measuring(gradients) if self.compensate else None
        return GateSolution(solved, source, self.ridge)


class GateFisher:
    """The Fisher of the gates of one group, and the order in which they are removed.

    Args:
        fisher: ``(size, size)`` float64 on the CPU, without damp.
        kept: ``(size,)`` bool, units that are there.
        damp: As a fraction of the mean diagonal.

    Attributes:
        order: Of removal, with the losses.
    """

    def __init__(self, fisher: Tensor, kept: Tensor, damp: float) -> None:
        diagonal = fisher.diagonal()[kept]
        self._scale = float(diagonal.mean()) if len(diagonal) else 0.0
        self._scale = self._scale if self._scale > 0 else 1.0  # gates that matter to nothing
        self._fisher = (fisher / self._scale).float().unsqueeze(0)
        self._ones, self._kept = torch.ones(1, len(kept)), kept.unsqueeze(0)
        self._solved = eliminate(self._fisher, self._ones, self._kept, damp, Unstructured())
        units = self._solved.rank[0].long().argsort(stable=True)[: int(kept.sum())]
        self.order = UnitOrder(units, self._solved.losses[0, : len(units)].double() * self._scale)

    def gates(self, pruned: Tensor) -> Tensor:
        """``(size,)`` float64: the best values of the other gates when some, bool ``(size,)``, are zero."""
        found = reconstruct(
            self._fisher,
            self._ones.double(),
            self._kept,
            pruned.unsqueeze(0),
            self._solved.damp,
            self._solved.use_float64,
        )
        return torch.where(self._kept[0], found[0], 1.0)


class GateSolution(UnitSolution):
    """Folds gates into weights, or fits the layers behind.

    Args:
        fishers: ``{group: the Fisher of its gates}``.
        source: Tells layer inputs and losses; None to fold gates whatever the loss.
        ridge: Of the fit.
    """

    def __init__(self, fishers: Mapping[str, GateFisher], source: MeasuringSource | None, ridge: float) -> None:
        super().__init__({name: fisher.order for name, fisher in fishers.items()})
        self._fishers, self._source, self._ridge = dict(fishers), source, ridge
        self._grams: Mapping[str, Tensor] = {} if source is None else source.layer_inputs()

    def weights(
        self, targets: Targets, pruned: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """See `UnitSolution.weights`."""
        before = targets.weights()
        folded = self._folded(targets, pruned)
        if self._source is None:
            return folded, {}
        groups = [units_of(targets)[name] for name in pruned]
        known = [group for group in groups if all(part.name in self._grams for part in group.consumers)]
        others = {name: gone for name, gone in pruned.items() if name not in {group.name for group in known}}
        fitted = compensate(
            known, targets, masks, self._grams, self._ridge
        )  # to what the gates of these groups do not change
        candidates = {"folded": folded, "fitted": {**self._folded(targets, others), **fitted}}
        found = self._source.losses([finished({**before, **new}, before, masks) for new in candidates.values()])
        losses = dict(zip(candidates, found, strict=True))
        chosen = best(losses)
        stats = {f"loss_{name}": loss for name, loss in losses.items()}
        return candidates[chosen], {**stats, "compensated": float(chosen == "fitted")}

    def _folded(self, targets: Targets, pruned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights with the gates of some groups in them."""
        folded: dict[str, Tensor] = {}
        for name, gone in pruned.items():
            fold(units_of(targets)[name], self._fishers[name].gates(gone), targets.weights(), folded)
        return folded

    def close(self) -> None:
        """Free the Fishers and the inputs."""
        self._fishers.clear()
        self._source, self._grams = None, {}


def fold(group: UnitGroup, gates: Tensor, weights: Mapping[str, Tensor], changed: dict[str, Tensor]) -> None:
    """Multiply the entries that a group's gates scale, into ``changed``."""
    for part in group.gates:
        weight = changed.get(part.name, weights[part.name])
        factors = torch.ones(weight.shape[part.dim], dtype=torch.float64)
        factors[part.index.cpu()] = gates.unsqueeze(1).expand(-1, part.index.shape[1])
        shape = [-1 if dim == part.dim else 1 for dim in range(weight.dim())]
        wide = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        changed[part.name] = wide * factors.to(wide.device, wide.dtype).view(shape)
