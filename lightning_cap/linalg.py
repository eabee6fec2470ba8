"""Batched Cholesky work on symmetric positive definite blocks, with the precision decided a block at a time.

Never the batched ``torch.linalg.inv``/``lu_factor``/``solve`` here: on CPU with two threads or more they hang
inside MKL for batches of n >= 160 (an upstream defect).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: Largest 1-norm condition number that float32 factorisation *and* elimination are trusted with.
FLOAT32_CONDITION = 1e4
#: The same for float64; beyond it the damp of the block is raised.
FLOAT64_CONDITION = 1e13


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 matrix products at full precision (no TF32, no bf16) inside, the caller's setting restored after."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def restrict(fisher: Tensor, alive: Tensor, damp: Tensor) -> Tensor:
    """The damped Fisher of the alive weights, embedded in a block-diagonal matrix of full size.

    Dead rows and columns are zero, their diagonal is the block's largest diagonal entry, so that neither the
    factorisation of the alive part nor the condition estimate is touched by them.

    Args:
        fisher: ``(k, B, B)`` without damp, float32 or float64.
        alive: ``(k, B)`` bool.
        damp: ``(k,)`` added to the diagonal of each block (equation 3's lambda).

    Returns:
        A new ``(k, B, B)`` tensor of the dtype of ``fisher``.
    """
    dead = ~alive
    matrix = fisher.masked_fill(dead.unsqueeze(-1) | dead.unsqueeze(-2), 0.0)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    diagonal += damp.to(matrix.dtype).unsqueeze(-1)
    filler = diagonal.masked_fill(dead, 0.0).amax(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    diagonal.copy_(torch.where(dead, filler, diagonal))
    return matrix


def spd_inverse(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse by Cholesky, and whether it can be trusted in this dtype.

    Args:
        matrix: ``(k, B, B)`` symmetric, float32 or float64.

    Returns:
        The inverses ``(k, B, B)`` and a bool ``(k,)``: factored, finite and with a 1-norm condition number below
        `FLOAT32_CONDITION` or `FLOAT64_CONDITION`.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    failed = (info != 0) | ~torch.isfinite(factor.diagonal(dim1=-2, dim2=-1)).all(-1)
    factor[failed] = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    inverse = torch.cholesky_inverse(factor)
    condition = matrix.abs().sum(-1).amax(-1) * inverse.abs().sum(-1).amax(-1)
    limit = FLOAT32_CONDITION if matrix.dtype == torch.float32 else FLOAT64_CONDITION
    return inverse, ~failed & torch.isfinite(condition) & (condition < limit)


def spd_solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    """``matrix⁻¹ rhs`` by Cholesky for ``(k, B, B)`` and ``(k, B)``. Blocks must be known to factor in this dtype."""
    factor = torch.linalg.cholesky(matrix)
    return torch.cholesky_solve(rhs.unsqueeze(-1), factor).squeeze(-1)
