"""Least squares: the layers that read pruned units make up for them by the inputs that they have left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_cap.solver.damping import more_damp
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import UnitGroup


def compensate(
    groups: Iterable[UnitGroup],
    targets: Targets,
    masks: Mapping[str, Tensor],
    grams: Mapping[str, Tensor],
    damp: float,
) -> dict[str, Tensor]:
    """New values of the weights that read units of some groups: ``argmin ‖(W - W') X‖²`` under their masks.

    Args:
        groups: Those of which units are pruned.
        targets: The weights as they were before.
        masks: ``{target: bool (*shape)}``; what is masked is zero in ``W'``.
        grams: ``{target: (G, I, I)}`` float64 ``X Xᵀ``; a weight without one is left as it is.
        damp: See `least_squares`.

    Returns:
        ``{target: (*shape)}`` float64, of the weights that read pruned units.
    """
    names = dict.fromkeys(part.name for group in groups for part in group.consumers if part.name in grams)
    return {name: least_squares(targets[name].detach(), masks[name], grams[name], damp) for name in names}


def least_squares(weight: Tensor, mask: Tensor, gram: Tensor, damp: float) -> Tensor:
    """``W'`` that changes a layer's outputs least, with zeros where the mask has them.

    Row by row ``w'_A = w_A + (H_AA + λ)⁻¹ H_AQ w_Q``, with ``A`` what its mask keeps and ``Q`` the rest; rows of one mask are
    solved together. Without ``λ`` this is least squares; with it, ``w'`` stays near ``w`` where the inputs say little.

    Args:
        weight: ``(O, I/G, *kernel)`` of a Linear or Conv layer of ``G`` groups.
        mask: bool of the same shape.
        gram: ``(G, n, n)`` float64 sums of ``x xᵀ``, ``n`` inputs of a row in the order of the weight.
        damp: ``λ`` as a fraction of the mean diagonal of ``gram``, above 0.

    Returns:
        ``(O, I/G, *kernel)`` float64 on the device of ``weight``.
    """
    groups = gram.shape[0]
    rows = weight.double().flatten(1).unflatten(0, (groups, -1))
    kept = mask.flatten(1).unflatten(0, (groups, -1))
    solved = [_group(w, k, h.to(w.device), damp) for w, k, h in zip(rows, kept, gram, strict=True)]
    return torch.stack(solved).reshape(weight.shape)


def _group(rows: Tensor, kept: Tensor, gram: Tensor, damp: float) -> Tensor:
    out = rows.masked_fill(~kept, 0.0)
    scale = float(gram.diagonal().mean())
    if not scale > 0:  # inputs that are always zero
        return out
    patterns, which = torch.unique(kept, dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        alike = which == number
        lost = rows[alike].masked_fill(pattern, 0.0)
        stays = pattern.nonzero().flatten()
        if len(stays) and bool(lost.any()):
            inner = gram[stays][:, stays]
            move = _solve(inner, (lost @ gram)[:, stays].mT, damp * scale).mT
            out[alike.nonzero(), stays] += move
    return out


def _solve(matrix: Tensor, rhs: Tensor, damp: float) -> Tensor:
    """``(matrix + damp)⁻¹ rhs``; the damp is raised until it factors."""
    raised = torch.tensor(damp, dtype=torch.float64)
    while True:
        factor, info = torch.linalg.cholesky_ex(
            matrix + float(raised) * torch.eye(len(matrix), device=matrix.device).double()
        )
        if not int(info):
            found = torch.cholesky_solve(rhs, factor)
            if bool(torch.isfinite(found).all()):
                return found
        raised = more_damp(raised)


def best(losses: Mapping[str, float]) -> str:
    """The name of the least loss, the first of several; one that is not finite only where all are not."""
    return min(losses, key=lambda name: losses[name] if math.isfinite(losses[name]) else math.inf)
