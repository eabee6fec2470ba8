"""Updates of removed weights (or groups) that do not know of each other, added up."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cap.solver.backend import Blocks, check_blocks, chunk_blocks
from lightning_cap.solver.groups import diagonal_groups
from lightning_cap.solver.linalg import restrict, spd_inverse
from lightning_cap.utilities.arguments import require_whole
from lightning_cap.utilities.memory import in_chunks
from lightning_cap.utilities.precision import full_float32


def update_independently(
    fisher: Blocks,
    weights: Tensor,
    alive: Tensor,
    pruned: Tensor,
    damp: Tensor,
    use_float64: Tensor,
    group: int = 1,
    chunk: int | None = None,
) -> Tensor:
    """``w - Σ_q F⁻¹ e_q w_q / [F⁻¹]_qq`` on the kept weights: equation 2's update of each removed weight, on the dense block.

    Of groups ``g``, ``w - Σ_g F⁻¹ E_gᵀ ([F⁻¹]_gg)⁻¹ w_g``. Correlations between what is removed are left out; see `reconstruct`.

    Args:
        fisher: ``(K, B, B)`` float32 without damp: a tensor, or anything that gives some blocks for ``fisher[index]``.
        weights: ``(K, B)``.
        alive: ``(K, B)`` bool, eligible before pruning.
        pruned: ``(K, B)`` bool, a subset of ``alive``.
        damp: ``(K,)`` float64.
        use_float64: ``(K,)`` bool, work on this block in float64.
        group: Weights in a group; divides ``B``.
        chunk: Blocks at a time; halved when memory runs out.

    Returns:
        ``(K, B)``, dtype of ``weights``; zero where pruned or never alive, the input bit for bit in blocks with nothing pruned.

    Raises:
        ConfigError: An argument is something else.
    """
    check_blocks(weights, chunk, alive=alive, pruned=pruned)
    require_whole("group", group)
    kept = alive & ~pruned
    result = torch.where(kept, weights, 0.0)

    def work(blocks: Tensor) -> None:
        dtype = torch.float64 if bool(use_float64[blocks[0]]) else torch.float32
        matrix, roots = restrict(fisher[blocks].to(dtype), alive[blocks], damp[blocks])
        inverse, _ = spd_inverse(matrix)
        removed = torch.where(pruned[blocks], weights[blocks], 0.0).to(dtype) * roots
        if group == 1:
            pushed = removed / inverse.diagonal(dim1=-2, dim2=-1)
        else:
            small = diagonal_groups(inverse, group).flatten(0, 1)
            pushed = _solve_small(small, removed.view(-1, group)).view_as(removed)
        shift = torch.bmm(inverse, pushed.unsqueeze(-1)).squeeze(-1) / roots
        result[blocks] = torch.where(kept[blocks], weights[blocks] - shift, 0.0).to(result.dtype)

    with full_float32():
        touched = pruned.any(-1) & kept.any(-1)
        for choice in (touched & ~use_float64, touched & use_float64):
            size = chunk or chunk_blocks(weights.shape[1], weights.device)
            in_chunks(choice.nonzero().squeeze(1), size, work)
    return result


def _solve_small(matrices: Tensor, rhs: Tensor) -> Tensor:
    """``matrices⁻¹ rhs`` for many tiny positive definite ``(m, n, n)``, by elimination over ``n`` for all at once."""
    matrices, rhs = matrices.clone(), rhs.clone()
    n = rhs.shape[-1]
    for j in range(n):
        factor = matrices[:, j + 1 :, j] / matrices[:, j : j + 1, j]
        matrices[:, j + 1 :] -= factor.unsqueeze(-1) * matrices[:, j : j + 1]
        rhs[:, j + 1 :] -= factor * rhs[:, j : j + 1]
    for j in reversed(range(n)):
        rhs[:, j] = (rhs[:, j] - (matrices[:, j, j + 1 :] * rhs[:, j + 1 :]).sum(-1)) / matrices[:, j, j]
    return rhs
