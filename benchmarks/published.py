"""The yardstick: the published CAP procedure in plain torch, in our own words.

What it does, after the authors' published code (itself after that of oBERT), and therefore what it costs:

- the *inverse* Fisher blocks are updated once a gradient by Sherman-Morrison: three passes over ``d·B`` floats each;
- elimination writes every ``B × B`` matrix once a step, ``B`` times in all, through a temporary of its size, and keeps the
  weights after every step, ``(B + 1)·d`` floats;
- a sparsity is one threshold over the blocks' cumulative losses; then a Python loop picks each block's row of the trace.

It is not slowed down beyond that: updates are in place where theirs are, blocks go through the elimination ``chunk`` at a time
(64 is its best on a CPU; all at once, the published default, is three times slower), and what only serves already sparse
weights, N:M or several devices is left out. It is float32 throughout, so on badly conditioned blocks its result is not the
right one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 64


class PublishedFisher:
    """``(damp·I + (1/N) Σ g gᵀ)⁻¹`` in blocks, one gradient at a time.

    Args:
        num_blocks: ``K``.
        block_size: ``B``.
        num_gradients: ``N``, needed from the start.
        damp: The damp.

    Attributes:
        inverse: ``(K, B, B)`` float32, right after ``N`` calls of `add`.
    """

    def __init__(self, num_blocks: int, block_size: int, num_gradients: int, damp: float) -> None:
        self._num_gradients = num_gradients
        self.inverse = (torch.eye(block_size) / damp).repeat(num_blocks, 1, 1)

    def add(self, gradient: Tensor) -> None:
        """Take in one gradient ``(K, B)``: ``H -= (H g)(H g)ᵀ / (N + gᵀ H g)``."""
        step = torch.einsum("kij,kj->ki", self.inverse, gradient)
        step /= (torch.einsum("ki,ki->k", gradient, step) + self._num_gradients).sqrt_().unsqueeze(1)
        self.inverse.baddbmm_(step.unsqueeze(2), step.unsqueeze(1), alpha=-1)


@dataclass(frozen=True)
class Traces:
    """What elimination leaves behind.

    Attributes:
        weights: ``(B + 1, K, B)``, the weights after ``0 ... B`` steps.
        scores: ``(K, B)``, for each weight the loss its block had taken when it went.
    """

    weights: Tensor
    scores: Tensor


@torch.no_grad()
def eliminate(inverse: Tensor, weights: Tensor, chunk: int = CHUNK) -> Traces:
    """Eliminate every block to its end.

    Args:
        inverse: ``(K, B, B)``; used up.
        weights: ``(K, B)``; used up, zero afterwards.
        chunk: Blocks at a time.
    """
    K, B = weights.shape
    traces = Traces(torch.zeros(B + 1, K, B), torch.zeros(K, B))
    for first in range(0, K, chunk):
        span = slice(first, first + chunk)
        traces.weights[:, span] = _eliminate_chunk(inverse[span], weights[span], traces.scores[span])
    return traces


def _eliminate_chunk(H: Tensor, w: Tensor, scores: Tensor) -> Tensor:
    """The trace ``(B + 1, k, B)`` of some blocks; fills their ``scores``."""
    k, B = w.shape
    rows, gone = torch.arange(k), torch.zeros(k, B, dtype=torch.bool)
    diagonal = H.diagonal(dim1=1, dim2=2)
    trace, total = torch.zeros(B + 1, k, B), torch.zeros(k)
    trace[0] = w
    for step in range(1, B + 1):
        candidates = w**2 / diagonal
        candidates[gone] = torch.inf
        least, pivot = candidates.min(1)
        total += least
        scores[rows, pivot] = total
        row, h = H[rows, pivot], diagonal[rows, pivot]
        w -= row * (w[rows, pivot] / h).unsqueeze(1)
        gone[rows, pivot] = True
        w[gone] = 0
        trace[step] = w
        if step < B:
            row /= h.sqrt().unsqueeze(1)
            H -= torch.bmm(row.unsqueeze(2), row.unsqueeze(1))
    scores /= 2
    return trace


@torch.no_grad()
def select(traces: Traces, sparsities: Sequence[float]) -> list[Tensor]:
    """The weights ``(K, B)`` at each sparsity."""
    in_order, _ = traces.scores.view(-1).sort()
    results = []
    for sparsity in sparsities:
        chosen = torch.zeros_like(traces.scores)
        threshold = in_order[math.ceil(sparsity * len(in_order)) - 1]
        for block in range(len(chosen)):
            zeros = torch.count_nonzero(traces.scores[block] <= threshold)
            chosen[block] = traces.weights[zeros, block]
        results.append(chosen)
    return results


def accumulate(rows: Iterable[Tensor], num_blocks: int, block_size: int, num_gradients: int, damp: float) -> Tensor:
    """The inverse Fisher blocks ``(K, B, B)`` of ``N`` gradients, each ``(K, B)``."""
    fisher = PublishedFisher(num_blocks, block_size, num_gradients, damp)
    for row in rows:
        fisher.add(row)
    return fisher.inverse


@torch.no_grad()
def rank1_elimination(H: Tensor, w: Tensor, steps: int, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """Plain rank-1 elimination alone, without traces: every matrix is written at every step.

    Args:
        H: ``(k, B, B)`` inverse Fisher blocks; used up.
        w: ``(k, B)``; used up.
        steps: Weights of each block that go.
        in_place: Not as published, but the best that torch has for it: one fused update without a temporary of the size of ``H``.

    Returns:
        The order ``(k, steps)`` int64 and the marginal losses ``(k, steps)``.
    """
    k = len(w)
    rows, gone = torch.arange(k), torch.zeros_like(w, dtype=torch.bool)
    diagonal = H.diagonal(dim1=1, dim2=2)
    order, losses = torch.empty(k, steps, dtype=torch.int64), torch.empty(k, steps)
    for step in range(steps):
        least, pivot = (w.square() / diagonal).masked_fill_(gone, torch.inf).min(1)
        order[:, step], losses[:, step] = pivot, least / 2
        row, h = H[rows, pivot], diagonal[rows, pivot]
        w -= row * (w[rows, pivot] / h).unsqueeze(1)
        gone[rows, pivot] = True
        row /= h.sqrt().unsqueeze(1)
        column, line = row.unsqueeze(2), row.unsqueeze(1)
        if in_place:
            H.addcmul_(column, line, value=-1)
        else:
            H -= torch.bmm(column, line)
    return order, losses
