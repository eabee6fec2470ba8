"""Batched Cholesky work on symmetric positive definite blocks, with the precision decided per block.

Never the batched ``torch.linalg.inv``/``lu_factor``/``solve`` here: on CPU with two threads or more they hang
inside MKL for batches of n >= 160 (an upstream defect).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cap.kernels.cpu.threads import over_blocks

#: Largest ``F_pp [F⁻¹]_pp`` that float32 factorisation *and* elimination are trusted with: a condition number that does not
#: depend on the scale of any weight. Losses were measured to be off by about the rounding unit (6e-8) times it, so by
#: two parts in a thousand here; what true loss the resulting masks have changes no more than by rounding the Fisher's own sums.
FLOAT32_CONDITION = 3e4
#: The same for float64; beyond it the damp of the block is raised.
FLOAT64_CONDITION = 1e13

_COMPILED = 512  # up to this size a block and its inverse stay in a core's cache, and our code is faster than LAPACK's


def restrict(fisher: Tensor, alive: Tensor, damp: Tensor) -> tuple[Tensor, Tensor]:
    """The damped Fisher of the alive weights, scaled by its own diagonal to one that is 1 (Jacobi).

    In the space of the weights times the roots of the diagonal nothing of OBS changes but the condition number, which is that of
    the correlations alone. Dead rows and columns are those of the identity.

    Args:
        fisher: ``(k, B, B)`` without damp, float32 or float64.
        alive: ``(k, B)`` bool.
        damp: ``(k,)`` added to the diagonal of each block (equation 3's lambda).

    Returns:
        A new ``(k, B, B)`` tensor of the dtype of ``fisher``, NaN in blocks with a diagonal that is not positive, and the roots
        of the diagonal ``(k, B)``, 1 at dead weights.
    """
    dead = ~alive
    roots = (fisher.diagonal(dim1=-2, dim2=-1).double() + damp.double().unsqueeze(-1)).sqrt_()
    roots.masked_fill_(dead, 1.0).masked_fill_(roots == 0, torch.nan)
    inverse_roots = roots.reciprocal().to(fisher.dtype)
    matrix = fisher * inverse_roots.unsqueeze(-1) * inverse_roots.unsqueeze(-2)
    matrix.masked_fill_(dead.unsqueeze(-1) | dead.unsqueeze(-2), 0.0)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    diagonal.copy_(torch.where(diagonal.isfinite() & roots.isfinite(), 1.0, torch.nan))
    return matrix, roots.to(fisher.dtype)


def spd_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse by Cholesky, and whether it can be trusted in this dtype.

    Args:
        matrix: ``(k, B, B)`` symmetric, float32 or float64.

    Returns:
        The inverses ``(k, B, B)`` and a bool ``(k,)``: factored, finite and with the largest ``F_pp [F⁻¹]_pp`` below
        `FLOAT32_CONDITION` or `FLOAT64_CONDITION`.
    """
    if matrix.device.type == "cpu" and matrix.shape[-1] <= _COMPILED:
        inverse, factored = _compiled_inverse(matrix)
    else:
        factor, info = torch.linalg.cholesky_ex(matrix)
        factored = (info == 0) & torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all(-1)
        factor[~factored] = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        inverse = _inverse_of_factor(factor)
    condition = (matrix.diagonal(dim1=-2, dim2=-1) * inverse.diagonal(dim1=-2, dim2=-1)).amax(-1)
    limit = FLOAT32_CONDITION if matrix.dtype == torch.float32 else FLOAT64_CONDITION
    return inverse, factored & torch.isfinite(condition) & (condition < limit)


def _compiled_inverse(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses of symmetric ``(k, B, B)``, and which factored, ``(k,)`` bool; on the CPU, in their dtype."""
    from lightning_cap.kernels.cpu.obs import invert_blocks

    given = matrices.contiguous()
    out, factored = torch.empty_like(given), torch.zeros(len(given), dtype=torch.bool)
    arrays = given.numpy(), out.numpy(), factored.numpy()
    over_blocks(lambda first, last: invert_blocks(*arrays, first, last), len(given))
    return out, factored


def _inverse_of_factor(factor: Tensor) -> Tensor:
    """``(L Lᵀ)⁻¹``. On a GPU by one batched triangular solve and one product: `cholesky_inverse` takes one matrix at a time."""
    if factor.device.type == "cpu":
        return torch.cholesky_inverse(factor)
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
    inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    return torch.bmm(inverse.mT, inverse)


def spd_solve(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix⁻¹ rhs`` by Cholesky for ``(k, B, B)`` and ``(k, B)``, and which blocks factored, ``(k,)`` bool."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    solution = torch.cholesky_solve(rhs.unsqueeze(-1), factor).squeeze(-1)
    return solution, (info == 0) & torch.isfinite(solution).all(-1)
