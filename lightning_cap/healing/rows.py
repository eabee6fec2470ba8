"""Damped least squares for each output row of a layer, on the weights that the row keeps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_cap.solver.backend import chunk_blocks
from lightning_cap.solver.damping import solve_with_damping
from lightning_cap.solver.linalg import FLOAT32_CONDITION, spd_solve
from lightning_cap.utilities.memory import in_chunks
from lightning_cap.utilities.precision import full_float32


class RowSolver:
    """Solves ``(M_SS + ridge·I) x_S = b_S`` for rows that share ``M`` but have each their own support ``S``.

    A row that keeps more than half of its weights may be solved by way of those ``Q`` that it lost: with ``H = (M + ridge·I)⁻¹``
    and ``u = H b``, ``x = u - H_:Q H_QQ⁻¹ u_Q`` is zero on ``Q`` and the solution on ``S``. So a row takes the third power of the
    smaller number of both.

    Args:
        matrix: ``(G, I, I)`` float64, symmetric, each with a mean diagonal of about 1 and used by ``O / G`` rows in turn.
        ridge: Above 0.
        support: ``(O, I)`` bool.
        rhs: ``(O, I)`` float64, ``b``.

    Attributes:
        raised: Rows that were solved with a larger ridge, because they could not be with this one.
    """

    def __init__(self, matrix: Tensor, ridge: float, support: Tensor, rhs: Tensor) -> None:
        self._matrix, self._ridge, self._support, self._rhs = matrix, ridge, support, rhs
        # their norms bound the largest eigenvalues
        condition = 1 + float(torch.linalg.matrix_norm(matrix).max()) / ridge
        self._dtype = torch.float32 if condition < FLOAT32_CONDITION else torch.float64
        groups = torch.arange(len(matrix), device=matrix.device)
        self._group = groups.repeat_interleave(len(rhs) // len(matrix))
        self._out = torch.zeros_like(rhs)
        self.raised = 0

    def solve(self, rows: Tensor) -> Tensor:
        """``x`` of some rows.

        Args:
            rows: ``(k,)`` int64, each with something in its support.

        Returns:
            ``(k, I)`` float64, zero off the support.

        Raises:
            GradientError: The matrix or a right-hand side is not finite.
        """
        asked, kept = rows, self._support[rows].sum(-1)
        lost = self._support.shape[1] - kept
        groups, size, _ = self._matrix.shape
        saved = (kept.double() ** 3 - lost.double() ** 3).clamp_min(0) / 3
        with full_float32():
            if float(saved.sum()) > groups * float(size) ** 3:  # else the inverse takes longer
                unsolved = self._solve_by_lost(rows[saved > 0], lost[saved > 0])
                rows = torch.cat([rows[saved == 0], unsolved])
                kept = self._support[rows].sum(-1)
            self._solve_by_kept(rows, kept)
        return self._out[asked]

    def _solve_by_kept(self, rows: Tensor, kept: Tensor) -> None:
        typed: dict[torch.dtype, Tensor] = {}

        def attempt(rows: Tensor, ridge: Tensor, dtype: torch.dtype) -> Tensor:
            if dtype not in typed:
                typed[dtype] = self._matrix.to(dtype)
            x, solved = _solve_on(typed[dtype], self._group[rows], self._support[rows], self._rhs[rows], ridge)
            self._out[rows[solved]] = x[solved]
            self.raised += int((solved & (ridge > self._ridge)).sum())
            return solved

        def work(rows: Tensor) -> None:
            ridge = torch.full((len(rows),), self._ridge, dtype=torch.float64, device=rows.device)
            solve_with_damping(rows, ridge, self._dtype, attempt)

        _in_chunks(rows, kept, work)

    def _solve_by_lost(self, rows: Tensor, lost: Tensor) -> Tensor:
        """Returns the rows that could not be."""
        inverse = self._inverse()
        free = self._times(self._rhs, inverse)  # u
        typed, found = inverse.to(self._dtype), torch.zeros_like(free)
        failed = []

        def work(rows: Tensor) -> None:
            none = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
            y, solved = _solve_on(typed, self._group[rows], ~self._support[rows], free[rows], none)
            found[rows] = y
            failed.append(rows[~solved])

        _in_chunks(rows, lost, work)
        x = (free - self._times(found, inverse)).masked_fill_(~self._support, 0.0)[rows]
        self._out[rows] = x
        unsolved: Tensor = torch.cat([*failed, rows[~torch.isfinite(x).all(-1)]]).unique()
        return unsolved

    def _inverse(self) -> Tensor:
        """``(G, I, I)`` float64; NaN where there is none."""
        eye = torch.eye(self._matrix.shape[1], dtype=torch.float64, device=self._matrix.device)
        factor, info = torch.linalg.cholesky_ex(self._matrix + self._ridge * eye)
        inverse: Tensor = torch.cholesky_inverse(factor)
        inverse[info != 0] = torch.nan
        return inverse

    def _times(self, rows: Tensor, matrix: Tensor) -> Tensor:
        """All rows, each times the matrix of its group."""
        product: Tensor = torch.bmm(rows.view(len(matrix), -1, rows.shape[1]), matrix)
        return product.view_as(rows)


def _in_chunks(rows: Tensor, sizes: Tensor, work: Callable[[Tensor], None]) -> None:
    """Those of about the same size together."""
    if len(rows):
        in_chunks(rows[sizes.argsort(stable=True)], chunk_blocks(max(1, int(sizes.max())), rows.device), work)


def _solve_on(matrix: Tensor, group: Tensor, chosen: Tensor, rhs: Tensor, damp: Tensor) -> tuple[Tensor, Tensor]:
    """``(M_TT + damp·I)⁻¹ b_T`` for the entries ``T`` that are chosen, ``(k, I)`` float64 and zero elsewhere.

    Args:
        matrix: ``(G, I, I)``; in its dtype it is solved.
        group: ``(k,)``.
        chosen: ``(k, I)`` bool, about as many in all rows.
        rhs: ``(k, I)``.
        damp: ``(k,)``.

    Returns:
        The solutions, and which of them were found, ``(k,)`` bool.
    """
    size = int(chosen.sum(-1).max())
    if size == 0:
        return torch.zeros_like(rhs), torch.ones(len(rhs), dtype=torch.bool, device=rhs.device)
    places = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :size]  # (k, size)
    real = chosen.gather(1, places)
    square = matrix[group[:, None, None], places[:, :, None], places[:, None, :]]
    square.masked_fill_(~(real[:, :, None] & real[:, None, :]), 0.0)
    square.diagonal(dim1=-2, dim2=-1).add_(torch.where(real, damp[:, None], 1.0).to(matrix.dtype))
    b = rhs.gather(1, places).masked_fill_(~real, 0.0).to(matrix.dtype)
    x, solved = spd_solve(square, b)
    return torch.zeros_like(rhs).scatter_(1, places, x.double()), solved
