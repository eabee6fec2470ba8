"""SparseGPT (Frantar & Alistarh 2023, algorithm 1), plainly and in float64, to be compared with."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # columns: of one mask, and of one lazy update


def sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float, nm: tuple[int, int] | None = None, damp: float = 0.01
) -> Tensor:
    """Columns from left to right; each hands its error to the right, by the rows of the Cholesky factor of the inverse.

    ``weight`` is ``(O, I)``, ``gram`` ``(I, I)`` the sum of ``x xᵀ``; ``nm`` keeps n of every m, chosen as they are reached.
    """
    W, H = weight.double().clone(), gram.double().clone()
    H.diagonal().add_(damp * H.diagonal().mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    for first in range(0, W.shape[1], BLOCK):
        last = min(first + BLOCK, W.shape[1])
        scales = factor.diagonal()[first:last]
        pruned = torch.zeros(len(W), last - first, dtype=torch.bool)
        if nm is None:
            scores = (W[:, first:last] / scales).square()
            pruned.view(-1)[scores.flatten().argsort()[: round(sparsity * scores.numel())]] = True
        errors = torch.zeros(len(W), last - first, dtype=torch.float64)
        for j in range(first, last):
            if nm is not None and (j - first) % nm[1] == 0:
                scores = (W[:, j : j + nm[1]] / factor.diagonal()[j : j + nm[1]]).square()
                least = scores.argsort(dim=1)[:, : nm[1] - nm[0]]
                pruned[:, j - first : j - first + nm[1]].scatter_(1, least, True)
            errors[:, j - first] = W[:, j].where(pruned[:, j - first], torch.zeros(())) / factor[j, j]
            W[:, j:last] -= errors[:, j - first : j - first + 1] * factor[j, j:last]
        W[:, first:last].masked_fill_(pruned, 0.0)
        W[:, last:] -= errors @ factor[first:last, last:]
    return W
