"""Left-looking OBS elimination in plain batched torch; any device, float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cap.sparsity.patterns import Pattern


def eliminate_left_looking(
    inverse: Tensor, floor: Tensor, weights: Tensor, alive: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """Remove weights one at a time in every block, least marginal loss first, until the pattern allows no more.

    Step ``t`` takes ``p = argmin w_p² / H_pp`` (equation 2) and forms only the pivot row of the current ``H`` from the
    earlier scaled pivot columns, ``H_p: = H0_p: - Σ_s u_s[p] u_s``; no ``B × B`` matrix is written.

    Args:
        inverse: ``H0 = F_AA⁻¹``, ``(k, B, B)``.
        floor: ``(k, B)`` lower bound of every ``H_pp`` to come, ``1 / F_pp``; guards against cancellation.
        weights: ``(k, B)``, same dtype.
        alive: ``(k, B)`` bool.
        pattern: Says which weights may be pruned.

    Returns:
        ``rank`` ``(k, B)`` int64, the step at which each weight was removed (``B`` if never), and the marginal
        losses by step ``(k, B)``, infinite from the block's last step on.
    """
    k, B = weights.shape
    largest = torch.finfo(weights.dtype).max
    weights, alive = weights.clone(), alive.clone()
    diagonal = torch.maximum(inverse.diagonal(dim1=-2, dim2=-1), floor)
    columns = inverse.new_empty(k, B, B)
    rank = torch.full((k, B), B, dtype=torch.int64, device=weights.device)
    losses = torch.full_like(weights, torch.inf)
    for step in range(B):
        removable = pattern.removable(alive)
        active = removable.any(-1)
        if not bool(active.any()):
            break
        scores = (
            (weights.square() / diagonal).nan_to_num_(nan=largest, posinf=largest).masked_fill_(~removable, torch.inf)
        )
        pivot = scores.argmin(-1, keepdim=True)  # (k, 1)
        index = pivot.unsqueeze(-1).expand(k, 1, B)
        row = inverse.gather(1, index)  # (k, 1, B)
        if step:
            past = columns[:, :step]
            row = torch.baddbmm(
                row, past.gather(2, pivot.unsqueeze(-1).expand(k, step, 1)).transpose(1, 2), past, alpha=-1
            )
        row = row.squeeze(1)
        h = diagonal.gather(1, pivot)
        w = weights.gather(1, pivot)
        losses[:, step] = torch.where(active, scores.gather(1, pivot).squeeze(1) / 2, torch.inf)
        column = torch.where(active.unsqueeze(-1) & alive, row / h.sqrt(), 0.0)
        columns[:, step] = column
        weights.addcmul_(column, w / h.sqrt(), value=-1.0)
        diagonal = torch.maximum(diagonal - column.square(), floor)
        pruned = torch.zeros_like(alive).scatter_(1, pivot, active.unsqueeze(-1))
        rank.masked_fill_(pruned, step)
        weights.masked_fill_(pruned, 0.0)
        alive &= ~pruned
    return rank, losses
