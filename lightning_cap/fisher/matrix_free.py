"""The inverse empirical Fisher of blocks from their gradient rows, without a ``B × B`` matrix (Frantar et al. 2021, M-FAC)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_cap.fisher.blocks import BlockSums, EmpiricalFisher, FisherBlocks, Storage
from lightning_cap.solver.linalg import FLOAT64_CONDITION

_FLOATS = 2**24  # of (k, N, B) and (k, N, N) at a time


def at_a_time(num_rows: int, block_size: int) -> int:
    """Blocks to work on at a time."""
    return max(1, _FLOATS // (max(1, num_rows) * (block_size + num_rows)))


class GradientRows(EmpiricalFisher):
    """Keeps the gradient rows of each block, ``4·N·d`` bytes, shared out over processes as the Fisher is."""

    def _make_sums(self, storage: Storage, storage_device: torch.device, allow_tf32: bool) -> BlockSums:
        return _Rows(len(self._selection), self._layout.block_size, storage_device)

    def finish(self) -> RowBlocks:
        """The rows. See `EmpiricalFisher.finish`."""
        super().finish()
        return RowBlocks(self._sums, 1 / self.count, self._device)


class RowBlocks(FisherBlocks):
    """Fisher blocks that are kept as gradient rows.

    Attributes:
        inverses: ``[(blocks, inverse)]`` that were worked out once for all blocks, if any.
    """

    def __init__(self, sums: BlockSums, scale: float, device: torch.device) -> None:
        super().__init__(sums, scale, device)
        self.inverses: list[tuple[Tensor, Inverse]] = []

    @property
    def _rows(self) -> _Rows:
        assert isinstance(self._sums, _Rows)
        return self._sums

    def rows(self, index: Tensor) -> Tensor:
        """``(k,)`` int64 -> ``(k, N, B)`` float32 on `device`."""
        return self._rows.rows(index.to(self._rows.device)).to(self.device)


class _Rows(BlockSums):
    def __init__(self, num_blocks: int, block_size: int, device: torch.device) -> None:
        self._shape = num_blocks, block_size
        self.device = device
        self._parts: list[Tensor] = []

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def count(self) -> int:
        return sum(len(part) for part in self._parts)

    def add(self, rows: Tensor) -> None:
        self._parts.append(rows.clone())

    def rows(self, index: Tensor) -> Tensor:
        return torch.cat([part[:, index] for part in self._parts]).transpose(0, 1)

    def take(self, index: Tensor, scale: float) -> Tensor:
        rows = self.rows(index)
        return torch.bmm(rows.mT, rows).mul_(scale)

    def diagonal(self) -> Tensor:
        total = torch.zeros(self._shape, device=self.device)
        for part in self._parts:
            total += part.square().sum(0)
        return total


class Inverse(ABC):
    """``F⁻¹`` of ``k`` blocks, ``F = damp·I + (1/N) Σ g gᵀ``, in float64.

    Args:
        rows: ``G``, ``(k, N, B)`` float64, zero at weights that are not alive.
        damp: ``(k,)`` float64.

    Attributes:
        well_conditioned: ``(k,)`` bool, whether the inverse of the block can be trusted.
    """

    well_conditioned: Tensor

    def __init__(self, rows: Tensor, damp: Tensor) -> None:
        self._damp = damp.view(-1, 1)
        self._floor = 1 / (rows.square().mean(1) + self._damp)

    def diagonal(self) -> Tensor:
        """``(k, B)``, never below ``1 / F_pp``, which it cannot be but by rounding."""
        return torch.maximum(self._diagonal(), self._floor)

    @abstractmethod
    def _diagonal(self) -> Tensor:
        """``(k, B)``."""

    @abstractmethod
    def times(self, vectors: Tensor) -> Tensor:
        """``F⁻¹ x`` of ``(k, B)``."""


class DynamicInverse(Inverse):
    """By the Gram matrix of the rows, as M-FAC's dynamic algorithm: ``F⁻¹ = (I - Gᵀ (N·damp·I + G Gᵀ)⁻¹ G) / damp``.
    See `Inverse`.
    """

    def __init__(self, rows: Tensor, damp: Tensor) -> None:
        super().__init__(rows, damp)
        self._rows = rows
        gram = torch.bmm(rows, rows.mT)
        gram.diagonal(dim1=-2, dim2=-1).add_(self._damp * rows.shape[1])
        self._factor, info = torch.linalg.cholesky_ex(gram)
        pivots = self._factor.diagonal(dim1=-2, dim2=-1).square()
        self.well_conditioned = (info == 0) & (pivots.amax(-1) < FLOAT64_CONDITION * pivots.amin(-1))

    def _diagonal(self) -> Tensor:
        """``(k, B)``."""
        half: Tensor = torch.linalg.solve_triangular(self._factor, self._rows, upper=False)
        return (1 - half.square().sum(1)) / self._damp

    def times(self, vectors: Tensor) -> Tensor:
        """``F⁻¹ x`` of ``(k, B)``."""
        inner = torch.cholesky_solve(torch.bmm(self._rows, vectors.unsqueeze(-1)), self._factor)
        return (vectors - torch.bmm(self._rows.mT, inner).squeeze(-1)) / self._damp


class StaticInverse(Inverse):
    """By rank-1 updates (M-FAC's static algorithm): ``v_i = F_{i-1}⁻¹ g_i``, after which a product costs ``O(N·B)``.

    ``F⁻¹ x = x / damp - Σ_i v_i (v_iᵀ x) / (N + g_iᵀ v_i)``.
    See `Inverse`; ``rows`` are overwritten by the ``v_i``.
    """

    def __init__(self, rows: Tensor, damp: Tensor) -> None:
        super().__init__(rows, damp)
        self._vectors = rows
        self._scales = torch.ones_like(rows[:, :, 0])
        for i in range(rows.shape[1]):
            gradient = rows[:, i].clone()
            vector = gradient / self._damp
            if i:
                past = rows[:, :i]
                inner = torch.bmm(past, gradient.unsqueeze(-1)) / self._scales[:, :i].unsqueeze(-1)
                vector -= torch.bmm(past.mT, inner).squeeze(-1)
            self._scales[:, i] = rows.shape[1] + (gradient * vector).sum(-1)
            rows[:, i] = vector
        self.well_conditioned = ((self._scales > 0) & (self._scales < FLOAT64_CONDITION * rows.shape[1])).all(-1)

    def _diagonal(self) -> Tensor:
        """``(k, B)``."""
        return 1 / self._damp - (self._vectors.square() / self._scales.unsqueeze(-1)).sum(1)

    def times(self, vectors: Tensor) -> Tensor:
        """``F⁻¹ x`` of ``(k, B)``."""
        inner = torch.bmm(self._vectors, vectors.unsqueeze(-1)) / self._scales.unsqueeze(-1)
        return vectors / self._damp - torch.bmm(self._vectors.mT, inner).squeeze(-1)
