"""Layer-wise pruning of units (ZipLM): by what their removal changes in the outputs of the layers that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_cap.calibration.layer_inputs import sum_up
from lightning_cap.calibration.sources import GradientSource
from lightning_cap.calibration.unit_samples import UnitInputs
from lightning_cap.errors import TargetError
from lightning_cap.pruners.unit_compensation import compensate
from lightning_cap.pruners.unit_merge import UnitOrder
from lightning_cap.pruners.unit_path import UnitSolution
from lightning_cap.pruners.units import UnitPruner
from lightning_cap.pruners.zero_gradients import check_zeros
from lightning_cap.solver.damping import more_damp
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import Slice, UnitGroup, consumers_of, units_of
from lightning_cap.utilities.arguments import require_counts, require_real
from lightning_cap.utilities.progress import Progress


@dataclass(kw_only=True, eq=False)
class LayerwiseUnits(UnitPruner):
    """Optimal Brain Surgeon on ``‖(W - Ŵ) X‖²``, the change of the outputs of the layers that read a unit.

    ZipLM (Kurtić et al. 2023, algorithm 1): the unit of least ``tr(W_G (H⁻¹_GG)⁻¹ W_Gᵀ)`` goes, with ``G`` its columns and ``H = X
    Xᵀ``; ``W`` and ``H⁻¹`` are updated, and so on. Needs forward passes alone. The loss of a unit is the increase of the error
    relative to ``‖W X‖²``, summed over its layers: outputs of different layers have no common unit. Over the model it is no
    prediction of the loss.

    Args:
        num_inputs: Samples whose layer inputs are collected.
        damp: Added to the diagonal of a layer's ``X Xᵀ``, as a fraction of its mean.
        cost: What a goal counts. See `UnitPruner`.
        allocation: How units are shared out over the groups. See `UnitPruner`.

    Raises:
        ConfigError: An argument is out of range.
    """

    num_inputs: int = 1024
    damp: float = 0.01

    predicts_loss: ClassVar[bool] = False  # but the error of outputs

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(num_inputs=self.num_inputs)
        require_real("damp", self.damp, "(0, inf)", example=0.01)

    @property
    def statistic(self) -> UnitInputs:
        """Inputs of the layers that read units."""
        return UnitInputs(self.num_inputs)

    def check(self, targets: Targets) -> None:
        """Refuse units that no layer reads. See `UnitPruner.check`."""
        super().check(targets)
        for name, group in units_of(targets).items():
            if not group.consumers:
                raise TargetError(
                    f"units: no layer reads those of {name!r}, so that its outputs could tell what they matter. Leave them out "
                    f"with exclude=[{name!r}], or use CAPUnits."
                )

    def held_bytes(self, targets: Targets) -> int:
        """The moments of layer inputs, and inverses of the largest."""
        squares = [8 * weight[0].numel() ** 2 for weight in consumers_of(targets).values()]
        return sum(squares) + 3 * max(squares)

    def _solve(
        self,
        targets: Targets,
        masks: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        gradients: GradientSource,
        progress: Progress | None,
    ) -> UnitSolution:
        self.check(targets)
        grams = sum_up(gradients, targets.device, list(consumers_of(targets)))
        units = units_of(targets)
        found = {n: any(bool(grams[part.name].any()) for part in group.consumers) for n, group in units.items()}
        check_zeros(found, grams.count, "inputs")
        orders = {}
        for number, (name, group) in enumerate(units.items()):
            readers = [
                _Reader(part, targets[part.name].detach(), grams[part.name], kept[name], self.damp)
                for part in group.consumers
            ]
            orders[name] = eliminate_units(readers, kept[name])
            if progress is not None:
                progress("solve", number + 1, len(units))
        return _Fitted(orders, grams, self.damp)


class _Fitted(UnitSolution):
    """Fits the layers that read pruned units, which is what the updates of the elimination add up to."""

    def __init__(self, orders: Mapping[str, UnitOrder], grams: Mapping[str, Tensor], damp: float) -> None:
        super().__init__(orders)
        self._grams, self._damp = dict(grams), damp

    def weights(
        self, targets: Targets, pruned: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        groups: list[UnitGroup] = [units_of(targets)[name] for name in pruned]
        return compensate(groups, targets, masks, self._grams, self._damp), {}

    def close(self) -> None:
        self._grams.clear()


class _Reader:
    """A weight that reads the units of a group, while units are taken from it.

    Args:
        part: Its columns.
        weight: ``(O, I/G, *kernel)``.
        gram: ``(G, n, n)`` float64.
        kept: ``(size,)`` bool, units that are there; the columns of others are out of the play from the start.
        damp: As a fraction of the mean diagonal.
    """

    def __init__(self, part: Slice, weight: Tensor, gram: Tensor, kept: Tensor, damp: float) -> None:
        kernel = weight[0, 0].numel()
        index = part.index.to(weight.device)
        self._columns = (index.unsqueeze(-1) * kernel + torch.arange(kernel, device=index.device)).flatten(
            1
        )  # (size, c)
        self._rows = weight.double().flatten(1).unflatten(0, (gram.shape[0], -1)).clone()  # (G, O/G, n)
        gone = self._columns[~kept.to(index.device)].flatten()
        self._rows[:, :, gone] = 0.0
        gram = gram.clone()
        gram[:, gone], gram[:, :, gone] = 0.0, 0.0
        energy = float(torch.einsum("goi,gij,goj->", self._rows, gram, self._rows))
        self._energy = energy if energy > 0 else 1.0  # a layer without inputs, or without weights
        self._inverse = _damped_inverse(gram, damp)

    def scores(self, units: Tensor) -> Tensor:
        """``(k,)`` relative error that each of some units would add."""
        columns = self._columns[units]
        blocks = self._inverse[:, columns.unsqueeze(-1), columns.unsqueeze(-2)]  # (G, k, c, c)
        taken = self._rows[:, :, columns].permute(0, 2, 3, 1)  # (G, k, c, O/G)
        factor = torch.linalg.cholesky_ex(blocks)[0]
        solved: Tensor = torch.linalg.solve_triangular(factor, taken, upper=False)
        return solved.square().sum((0, 2, 3)) / self._energy

    def remove(self, unit: int) -> None:
        """Take a unit out, and update the other columns and the inverse."""
        columns = self._columns[unit]
        rows = self._inverse[:, columns]  # (G, c, n)
        factor = torch.linalg.cholesky(rows[:, :, columns])
        solved = torch.cholesky_solve(rows, factor)
        self._rows -= self._rows[:, :, columns] @ solved
        self._inverse -= rows.mT @ solved
        self._rows[:, :, columns] = 0.0


def _damped_inverse(gram: Tensor, damp: float) -> Tensor:
    """``(X Xᵀ + λ)⁻¹`` of each group; ``λ`` is raised until it factors."""
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    scale = torch.where(scale > 0, scale, 1.0)
    raised = torch.tensor(damp, dtype=torch.float64)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    while True:
        factor, info = torch.linalg.cholesky_ex(gram + (float(raised) * scale)[:, None, None] * eye)
        if not bool(info.any()):
            inverse: Tensor = torch.cholesky_inverse(factor)
            return inverse
        raised = more_damp(raised)


def eliminate_units(readers: Sequence[_Reader], kept: Tensor) -> UnitOrder:
    """The units of a group, least error first, one at a time.

    Args:
        readers: The layers that read them; changed.
        kept: ``(size,)`` bool on the CPU, units that are there.
    """
    left = kept.nonzero().flatten().tolist()
    order: list[int] = []
    losses: list[float] = []
    while left:
        scores = torch.stack([reader.scores(torch.tensor(left)) for reader in readers]).sum(0)
        place = int(scores.argmin())
        losses.append(float(scores[place]))
        order.append(left.pop(place))
        for reader in readers if left else ():
            reader.remove(order[-1])
    return UnitOrder(torch.tensor(order, dtype=torch.int64), torch.tensor(losses, dtype=torch.float64))
