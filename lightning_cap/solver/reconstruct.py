"""The kept weights of every block once its pruned set is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cap.linalg import full_float32, restrict, spd_solve

_CHUNK_FLOATS = 2**22


def reconstruct(
    fisher: Tensor, weights: Tensor, alive: Tensor, pruned: Tensor, damp: Tensor, precise: Tensor
) -> Tensor:
    """``w'_S = w_S + F_SS⁻¹ F_SQ w_Q`` in one solve a block, ``S`` kept and ``Q`` pruned.

    The minimiser of equation 4 for a given ``Q``, equal to the sequential updates of equation 2 in exact arithmetic.

    Args:
        fisher: ``(K, B, B)`` float32 without damp.
        weights: ``(K, B)`` float32 or float64.
        alive: ``(K, B)`` bool, eligible before pruning.
        pruned: ``(K, B)`` bool, a subset of ``alive``.
        damp: ``(K,)`` float64.
        precise: ``(K,)`` bool, solve this block in float64.

    Returns:
        ``(K, B)``, dtype of ``weights``: zero where pruned or never alive, the input bit for bit in blocks with nothing
        pruned.
    """
    B = weights.shape[1]
    kept = alive & ~pruned
    result = torch.where(kept, weights, 0.0)
    touched = pruned.any(-1) & kept.any(-1)
    with full_float32():
        for dtype, choice in ((torch.float32, touched & ~precise), (torch.float64, touched & precise)):
            for blocks in choice.nonzero().squeeze(1).split(max(1, _CHUNK_FLOATS // B**2)):
                keep, gone = kept[blocks], pruned[blocks]
                matrix, w = fisher[blocks].to(dtype), weights[blocks]
                rhs = torch.bmm(matrix, torch.where(gone, w, 0.0).to(dtype).unsqueeze(-1)).squeeze(-1)
                shift = spd_solve(restrict(matrix, keep, damp[blocks]), torch.where(keep, rhs, 0.0))
                result[blocks] = torch.where(keep, w + shift, 0.0).to(result.dtype)
    return result
