"""Shrinkage of Fisher blocks: what they lack in gradient samples, they borrow from the other blocks of their layer.

``N`` gradient rows tell the ``B (B - 1) / 2`` correlations of a block poorly. But the gradient of a layer's weight is a sum of
outer products of output gradients and inputs, so blocks at the same place of all output rows have much the same correlations,
those of the inputs. Their mean is known far better than each of them is. The idea is that of Ledoit and Wolf (2004), with a
layer's own mean to shrink towards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_cap.sparsity.block_layout import BlockLayout, Selection
from lightning_cap.sparsity.shards import OwnLayout
from lightning_cap.utilities import distributed

_FLOATS = 2**21  # of pooled blocks that are summed over ranks at once


class Shrinkable(ABC):
    """Sums of blocks that can be pooled and shrunk in place."""

    @abstractmethod
    def pool(self, index: Tensor) -> Tensor:
        """``Σ_b F_b`` over some blocks, ``(*S)`` float64, in the form in which they are kept."""

    @abstractmethod
    def shrink(self, index: Tensor, pooled: Tensor, share: float) -> None:
        """``F_b ← (1 - share) F_b + share · D_b^½ R D_b^½``, with ``R`` the correlations of ``pooled``, ``D_b = diag F_b``."""


def shrink_blocks(
    sums: Shrinkable, layout: BlockLayout, selection: Selection, share: float, among: torch.device | None
) -> None:
    """Shrink the correlations of every block towards the mean of all blocks at its place in the output rows of its target.

    The diagonal stays. A block that is alone at its place stays as it is. The blocks of all processes are pooled; of several
    passes over the gradients each pools its own.

    Args:
        sums: Of the blocks of ``selection``, changed in place.
        layout: Block view of the targets.
        selection: The blocks that this process holds.
        share: How far, ``α`` in [0, 1]: 0 keeps the blocks, 1 leaves nothing of their own correlations.
        among: Where what processes tell each other has to be, if other processes hold other blocks; then all must call it.
    """
    places = block_places(layout.whole if isinstance(layout, OwnLayout) else layout)
    own = places[layout.positions[selection.blocks] if isinstance(layout, OwnLayout) else selection.blocks]
    groups = torch.arange(int(places.max()) + 1)
    counts = torch.zeros(len(groups), dtype=torch.int64).scatter_add_(0, own, torch.ones_like(own))
    if among is not None:
        counts = torch.stack(distributed.gather_tensors(counts.to(among))).sum(0).cpu()
    order = own.argsort(stable=True)
    ends = torch.searchsorted(own[order], groups, right=True).tolist()
    members = {g: order[(ends[g - 1] if g else 0) : ends[g]] for g in groups.tolist()}
    size = max(1, _FLOATS // layout.block_size**2)
    for some in (counts > 1).nonzero().squeeze(1).split(size):
        if not len(some):  # nothing is shared, as all processes know
            return
        pooled = torch.stack([sums.pool(members[g]) for g in some.tolist()])
        if among is not None:
            pooled = distributed.sum_over_ranks(pooled.to(among)).to(pooled.device)
        for group, total in zip(some.tolist(), pooled, strict=True):
            if len(members[group]):
                sums.shrink(members[group], total, share)


def block_places(layout: BlockLayout) -> Tensor:
    """For each block ``(K,)`` int64 a number that it shares with the blocks of its target that begin at the same place of a row."""
    places, first = torch.empty(layout.num_blocks, dtype=torch.int64), 0
    for name, span in layout.spans.items():
        shape, count = layout.shapes[name], span.stop - span.start
        length = torch.Size(shape[1:]).numel()
        index = torch.arange(count)
        place = index % max(1, count // shape[0]) if layout.by_row else index * layout.block_size % length
        if length == 1:  # no inputs that rows could have in common
            place = index
        _, dense = place.unique(return_inverse=True)
        places[span] = first + dense
        first += int(dense.max()) + 1
    return places


def correlations(pooled: Tensor, rows: Tensor, columns: Tensor, diagonal: Tensor) -> Tensor:
    """What entries ``(E,)`` of ``pooled`` ``(E,)`` are as correlations; 0 where a diagonal entry is 0.

    Args:
        pooled: Entries of a symmetric block.
        rows: ``(E,)`` int64, where in ``diagonal`` each entry's row is.
        columns: ``(E,)`` int64, the same of its column.
        diagonal: ``(B,)``.
    """
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt().masked_fill(diagonal <= 0, 0.0)
    return pooled * scale[rows] * scale[columns]
