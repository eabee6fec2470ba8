"""OBS elimination of whole groups of consecutive weights (equation 5), in plain batched torch."""

from __future__ import annotations

import torch
from torch import Tensor


def group_losses(small: Tensor, floor: Tensor, weights: Tensor) -> Tensor:
    """``½ w_gᵀ (H_gg)⁻¹ w_g``, what it costs to remove each group as a whole (equation 5).

    Args:
        small: ``H_gg``, ``(k, G, n, n)``; decoupled from pruned members, whose weights are zero.
        floor: ``(k, G, n)`` lower bound of every pivot, ``1 / F_pp``.
        weights: ``(k, G, n)``.

    Returns:
        ``(k, G)``.
    """
    small, rest = small.clone(), weights.clone()
    loss = torch.zeros_like(weights[..., 0])
    for j in range(weights.shape[-1]):
        pivot = torch.maximum(small[..., j, j], floor[..., j])
        loss += rest[..., j].square() / pivot / 2
        column = small[..., j + 1 :, j]
        rest[..., j + 1 :] -= column * (rest[..., j] / pivot).unsqueeze(-1)
        small[..., j + 1 :, j + 1 :] -= column.unsqueeze(-1) * (column / pivot.unsqueeze(-1)).unsqueeze(-2)
    return loss


def diagonal_groups(inverse: Tensor, size: int) -> Tensor:
    """``(k, B, B)`` -> the ``(k, B/n, n, n)`` blocks on its diagonal, a copy."""
    k, B, _ = inverse.shape
    return inverse.view(k, B // size, size, B // size, size).diagonal(dim1=1, dim2=3).movedim(-1, 1).clone()


def eliminate_groups(
    inverse: Tensor, floor: Tensor, weights: Tensor, alive: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Remove groups one at a time in every block, those of least loss per weight first, until none is left.

    The weights of a group are pruned one after the other with the update of all others, which is the joint update of the group.
    Left-looking as `eliminate_left_looking`, with the ``n × n`` blocks on the diagonal of ``H`` kept up to date.

    Args:
        inverse: ``H0 = F_AA⁻¹``, ``(k, B, B)``.
        floor: ``(k, B)`` lower bound of every ``H_pp`` to come.
        weights: ``(k, B)``, same dtype.
        alive: ``(k, B)`` bool.
        size: Weights in a group, ``n``; divides ``B``.

    Returns:
        ``rank`` ``(k, B)`` int64, ``B`` for weights that are never pruned, and ``(k, B)`` losses by step: each weight of a
        group has an equal part of the group's.
    """
    k, B = weights.shape
    largest = torch.finfo(weights.dtype).max
    weights, alive = weights.clone(), alive.clone()
    small = diagonal_groups(inverse, size)
    floors = floor.view(k, -1, size)
    columns = inverse.new_zeros(k, B, B)
    rank = torch.full((k, B), B, dtype=torch.int64, device=weights.device)
    losses = torch.full_like(weights, torch.inf)
    taken = rank.new_zeros(k, 1)
    for turn in range(B // size):
        members = alive.view(k, -1, size).sum(-1)
        if not bool(members.any()):
            break
        cost = group_losses(small, floors, weights.view(k, -1, size)) / members.clamp_min(1)
        cost = cost.nan_to_num_(nan=largest, posinf=largest).clamp_min_(0.0).masked_fill_(members == 0, torch.inf)
        group = cost.argmin(-1, keepdim=True)  # (k, 1)
        each = cost.gather(1, group)
        for j in range(size):
            slot = turn * size + j
            pivot = group * size + j
            active = alive.gather(1, pivot)
            _remove(inverse, columns, slot, pivot, active, floor, weights, alive, small)
            place = torch.where(active, taken, B - 1)
            losses.scatter_(1, place, torch.where(active, each, losses.gather(1, place)))
            rank.scatter_(1, pivot, torch.where(active, taken, rank.gather(1, pivot)))
            taken = taken + active
    return rank, losses


def _remove(
    inverse: Tensor,
    columns: Tensor,
    slot: int,
    pivot: Tensor,
    active: Tensor,
    floor: Tensor,
    weights: Tensor,
    alive: Tensor,
    small: Tensor,
) -> None:
    """Remove the weight ``pivot`` ``(k, 1)`` of each block where ``active``, in place of ``columns[:, slot]`` and all after it."""
    k, B = weights.shape
    row = inverse.gather(1, pivot.unsqueeze(-1).expand(k, 1, B))
    if slot:
        past = columns[:, :slot]
        row = torch.baddbmm(row, past.gather(2, pivot.unsqueeze(-1).expand(k, slot, 1)).transpose(1, 2), past, alpha=-1)
    row = row.squeeze(1)
    root = torch.maximum(row.gather(1, pivot), floor.gather(1, pivot)).sqrt()
    column = torch.where(active & alive, row / root, 0.0)
    columns[:, slot] = column
    weights.addcmul_(column, weights.gather(1, pivot) / root, value=-1.0)
    parts = column.view(k, -1, small.shape[-1])
    small -= parts.unsqueeze(-1) * parts.unsqueeze(-2)
    alive.scatter_(1, pivot, alive.gather(1, pivot) & ~active)
    weights.masked_fill_(~alive, 0.0)
