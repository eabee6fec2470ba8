"""The order of WoodFisher: every saliency on the dense block, all weights removed at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_cap.solver.groups import diagonal_groups, group_losses

if TYPE_CHECKING:
    from lightning_cap.sparsity.patterns import Pattern


def rank_by_saliency(
    inverse: Tensor, floor: Tensor, weights: Tensor, alive: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """Order by ``w_p² / (2 H_pp)`` (equation 2), for whole groups by ``½ w_gᵀ (H_gg)⁻¹ w_g`` a weight (equation 5).

    Args:
        inverse: ``H = F_AA⁻¹``, ``(k, B, B)``.
        floor: ``(k, B)`` lower bound of ``H_pp``.
        weights: ``(k, B)``, same dtype.
        alive: ``(k, B)`` bool.
        pattern: Which weights may go.

    Returns:
        ``rank`` ``(k, B)`` int64, ``B`` for weights that never go, and ``(k, B)`` rising saliencies, infinite past the last.
    """
    k, B = weights.shape
    largest = torch.finfo(weights.dtype).max
    if pattern.whole_groups:
        size = pattern.group_size
        groups = weights.masked_fill(~alive, 0.0).view(k, -1, size)
        cost = group_losses(diagonal_groups(inverse, size), floor.view(k, -1, size), groups)
        cost = cost / alive.view(k, -1, size).sum(-1).clamp_min(1)
        scores = cost.unsqueeze(-1).expand(-1, -1, size).reshape(k, B)
    else:
        scores = weights.square() / torch.maximum(inverse.diagonal(dim1=-2, dim2=-1), floor) / 2
    scores = scores.nan_to_num(nan=largest, posinf=largest)
    goes = alive if pattern.sparsity is None else pattern.lowest_scores(scores, alive)
    losses, order = scores.masked_fill(~goes, torch.inf).sort(dim=-1, stable=True)
    places = torch.arange(B, device=order.device).expand(k, B)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return rank.masked_fill_(~goes, B), losses
