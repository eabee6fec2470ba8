"""The order of WoodFisher: every saliency on the dense block, all weights removed at once."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cap.solver.groups import diagonal_groups, group_losses
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
        pattern: Which weights may be pruned.

    Returns:
        ``rank`` ``(k, B)`` int64, ``B`` for weights that are never pruned, and ``(k, B)`` rising saliencies, infinite past the
        last.
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
    return order_by(scores, alive if pattern.sparsity is None else pattern.lowest_scores(scores, alive))


def order_by(scores: Tensor, pruned: Tensor) -> tuple[Tensor, Tensor]:
    """The order in which weights of rising score are pruned.

    Args:
        scores: ``(k, B)``.
        pruned: ``(k, B)`` bool, the weights that ever are.

    Returns:
        ``rank`` ``(k, B)`` int64, ``B`` for weights that never are, and the ``(k, B)`` scores by step, infinite past the last.
    """
    losses, order = scores.masked_fill(~pruned, torch.inf).sort(dim=-1, stable=True)
    places = torch.arange(scores.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, places)
    return rank.masked_fill_(~pruned, scores.shape[1]), losses
