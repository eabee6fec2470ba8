"""One layer: the second moments of its inputs are added up, then its rows are solved and written in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_cap.calibration.layer_inputs import outer_products
from lightning_cap.errors import GradientError
from lightning_cap.healing.rows import RowSolver
from lightning_cap.utilities import distributed
from lightning_cap.utilities.precision import full_float32


class Fit(NamedTuple):
    """What became of a layer.

    Attributes:
        before: Squared error of its outputs before, as a share of their squares.
        after: The same afterwards.
        raised: Rows that needed a larger ridge.
        left: Rows that were left as they were: what was solved is not finite in the weight's dtype, or by rounding no better.
    """

    before: float
    after: float
    raised: int
    left: int


class HealedLayer:
    """A Linear, Conv1d or Conv2d whose kept weights, and bias if that is not frozen, are moved.

    Args:
        name: Of the target, for messages.
        module: The layer.
        mask: ``(*shape)`` bool, False = pruned.
        dense: ``(*shape)``, the weight before pruning.
        dense_bias: ``(O)``. Default: the bias as it is.

    Attributes:
        module: The layer.
    """

    def __init__(self, name: str, module: Any, mask: Tensor, dense: Tensor, dense_bias: Tensor | None) -> None:
        bias = module.bias if isinstance(module.bias, nn.Parameter) and module.bias.requires_grad else None
        self._name, self.module, self._bias, self._mask = name, module, bias, mask
        self._bias_dtype = module.weight.dtype if bias is None else bias.dtype
        self._dense = dense, bias if dense_bias is None else dense_bias
        size, self._groups = module.weight[0].numel() + (bias is not None), int(getattr(module, "groups", 1))
        self._gram = torch.zeros(0, dtype=torch.float64, device=module.weight.device)
        self._shape = self._groups, size, size

    def add(self, x: Tensor) -> None:
        """Take in what the layer is called with."""
        part = outer_products(self.module, x, ones=self._bias is not None)
        self._gram = self._gram.add_(part) if len(self._gram) else part.double()

    @torch.no_grad()
    def fit(self, ridge: float) -> Fit | None:
        """Solve the rows, a share of them on each process, and write them. Every process must call it.

        Returns:
            What became of them; None where all inputs are zero, which tells nothing.

        Raises:
            GradientError: Inputs are not finite.
        """
        own = self._gram if len(self._gram) else self._gram.new_zeros(self._shape)
        self._gram = self._gram.new_zeros(0)
        with full_float32():
            gram = distributed.sum_over_ranks(own)
            del own
            if not bool(torch.isfinite(gram).all()):
                raise GradientError(
                    f"inputs: those of the layer of {self._name!r} are not finite. Check the model and the calibration data."
                )
            diagonal = gram.diagonal(dim1=1, dim2=2)[:, : self._mask[0].numel()].mean(1)
            if not bool(diagonal.any()):
                return None
            gram /= torch.where(diagonal > 0, diagonal, 1.0)[:, None, None]
            return self._fit(gram, diagonal > 0, ridge)

    def _fit(self, gram: Tensor, known: Tensor, ridge: float) -> Fit:
        keep = self._mask.to(gram.device).flatten(1)
        weight = torch.where(keep, self.module.weight.flatten(1), 0.0)
        start, goal = self._rows(weight, self._bias), self._rows(*self._dense)
        support = torch.ones_like(start, dtype=torch.bool)
        support[:, : keep.shape[1]] = keep
        error = goal - start
        rhs = self._times(error, gram)
        wanted = (error != 0).any(1) & support.any(1) & known.repeat_interleave(len(start) // self._groups)
        rows = wanted.nonzero().squeeze(1)
        shares = rows.tensor_split(distributed.world_size())
        solver = RowSolver(gram, ridge, support, rhs)
        with distributed.raise_on_all_ranks(f"Healing the layer of {self._name!r}"):
            shift = solver.solve(shares[distributed.rank()])
        shift = distributed.gather_rows(shift, [len(share) for share in shares])
        inputs = keep.shape[1]
        moved = start[rows] + shift
        new, new_bias = moved[:, :inputs].to(weight.dtype), moved[:, inputs:].to(self._bias_dtype)
        healed = error.clone()
        healed[rows] -= shift
        before, after = ((e * self._times(e, gram)).sum(1) for e in (error, healed))
        better = torch.isfinite(new).all(1) & torch.isfinite(new_bias).all(1) & (after[rows] <= before[rows])
        distributed.broadcast(better)
        left, rows = rows[~better], rows[better]
        weight[rows] = new[better]
        self.module.weight.copy_(weight.view_as(self.module.weight))
        if self._bias is not None:
            self._bias[rows] = new_bias[better].squeeze(1)
        after[left] = before[left]
        scale = float((goal * self._times(goal, gram)).sum()) or 1.0
        raised = sum(distributed.gather_counts(solver.raised, gram.device))
        return Fit(float(before.sum()) / scale, float(after.sum()) / scale, raised, len(left))

    def _rows(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``(O, I)`` float64, the bias as the last weight."""
        parts = [weight.flatten(1)] if self._bias is None or bias is None else [weight.flatten(1), bias.unsqueeze(1)]
        return torch.cat([part.to(self.module.weight.device, torch.float64) for part in parts], 1)

    def _times(self, rows: Tensor, gram: Tensor) -> Tensor:
        return torch.bmm(rows.view(self._groups, -1, rows.shape[1]), gram).view_as(rows)
