"""From scores to the weights that are pruned: the exact k-th value, over all processes, under budgets and floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_cap.kernels.cpu.threads import over_blocks
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_choice

Ranking = Literal["marginal", "cumulative"]


def block_scores(losses: Tensor, ranking: Ranking) -> Tensor:
    """Score of every elimination, non-decreasing along each block, so that a threshold cuts it at a prefix.

    Args:
        losses: ``(K, B)`` marginal losses by step, infinite past a block's last step.
        ranking: ``"cumulative"``: the block's summed loss so far (algorithm 1, lines 8-9). ``"marginal"``: the slopes of the
            lower convex envelope of the block's loss curve (pool adjacent violators), which makes the total predicted
            loss least.

    Returns:
        ``(K, B)`` float32, infinite where ``losses`` is.

    Raises:
        ConfigError: ``ranking`` is none of them.
    """
    require_choice("ranking", ranking, get_args(Ranking))
    if ranking == "cumulative":
        # on the CPU: torch refuses a floating-point cumsum on CUDA where deterministic algorithms are asked for
        return losses.cpu().double().cumsum(-1).float().to(losses.device)
    return pool_adjacent_violators(losses)


def pool_adjacent_violators(values: Tensor) -> Tensor:
    """Least-squares non-decreasing fit of each row of ``values`` ``(k, B)``, as float32; infinite entries end a row."""
    if values.device.type != "cpu":
        return torch.cat([_pool_in_rounds(chunk) for chunk in values.split(2**13)])
    from lightning_cap.kernels.cpu.isotonic import pool_rows

    given, out = values.contiguous().numpy(), torch.empty(values.shape)
    over_blocks(lambda first, last: pool_rows(given, out.numpy(), first, last), len(values))
    return out


def _pool_in_rounds(values: Tensor) -> Tensor:
    """The same by whole-tensor operations, for a GPU.

    Every row keeps a stack of pools (sum, count); in each round a row either merges its two last pools, if they are out
    of order, or pushes its next value. Two rounds per value are enough.
    """
    k, B = values.shape
    rows = torch.arange(k, device=values.device)
    valid = torch.isfinite(values)
    length = valid.sum(-1)
    source = torch.where(valid, values, 0.0).double()
    sums = torch.zeros(k, B + 2, dtype=torch.float64, device=values.device)  # slot -1 and -2: scratch
    counts = torch.ones(k, B + 2, dtype=torch.float64, device=values.device)
    top = torch.full((k,), -1, device=values.device)
    taken = torch.zeros_like(top)
    for _ in range(2 * B):
        a, b = (top - 1).clamp_min(0), top.clamp_min(0)
        merge = (top >= 1) & (sums[rows, a] / counts[rows, a] > sums[rows, b] / counts[rows, b])
        push = ~merge & (taken < length)
        total, count = sums[rows, a] + sums[rows, b], counts[rows, a] + counts[rows, b]
        new = torch.where(push, source[rows, taken.clamp_max(B - 1)], total)
        slot = torch.where(merge, a, torch.where(push, top + 1, B + 1))
        sums[rows, slot] = new
        counts[rows, slot] = torch.where(push, 1.0, count)
        top = top + push.long() - merge.long()
        taken = taken + push.long()
    used = torch.arange(B + 2, device=values.device) <= top.unsqueeze(-1)
    ends = torch.where(used, counts, 0.0).long().cumsum(-1)
    position = torch.arange(B, device=values.device).expand(k, B).contiguous()
    pool = torch.searchsorted(ends, position, right=True).clamp_max(B + 1)
    return torch.where(valid, (sums / counts).gather(1, pool), torch.inf).float()


def at_group_ends(scores: Tensor, rank: Tensor, size: int) -> Tensor:
    """Give every step the score at which its group of weights is pruned as a whole, so that no threshold cuts inside a group.

    Args:
        scores: ``(K, B)`` by step, not decreasing along a block.
        rank: ``(K, B)`` the step at which each weight is pruned, ``B`` for never; groups are pruned one after the other.
        size: Consecutive weights in a group.
    """
    parts = []
    for score, step in zip(scores.split(2**13), rank.split(2**13), strict=True):
        group = step.argsort(dim=-1, stable=True) // size  # by step
        last = torch.arange(scores.shape[1], device=step.device) + 1 == (step < scores.shape[1]).sum(-1, keepdim=True)
        last[:, :-1] |= group[:, 1:] != group[:, :-1]
        parts.append(score.masked_fill(~last, torch.inf).flip(-1).cummin(-1).values.flip(-1))
    return torch.cat(parts)


def select(
    scores: Tensor,
    rows: Mapping[str, Tensor],
    removals: Sequence[tuple[Sequence[str], int]],
    most: Mapping[str, int] | None = None,
    *,
    sharded: bool = False,
    signed: bool = False,
) -> Tensor:
    """Mask of the weights that are pruned, ``(K, B)`` bool: the smallest scores of each budget.

    Args:
        scores: ``(K, B)`` float32, not negative; infinite where nothing can be pruned.
        rows: Rows of ``scores`` of each target, int64.
        removals: ``[(target names, how many of their weights are pruned)]``.
        most: How many weights of each target may be pruned, where several compete (a floor); None for no limit.
        sharded: Every process has some of the rows of each target, in order of rank; all must call.
        signed: Scores may be negative.
    """
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for names, count in removals:
        mine = torch.cat([rows[name] for name in names])
        part, parts = scores[mine], [len(rows[name]) * scores.shape[1] for name in names]
        if most is not None and len(names) > 1:  # what lies beyond a target's floor comes last
            allowed = [smallest(scores[rows[name]], most[name], sharded=sharded, signed=signed) for name in names]
            within = torch.cat(allowed)
            part = part.masked_fill(~within, torch.inf)
            chosen[mine] = within & smallest(part, count, sharded=sharded, signed=signed, parts=parts)
        else:
            chosen[mine] = smallest(part, count, sharded=sharded, signed=signed, parts=parts)
    return chosen


def smallest(
    scores: Tensor, count: int, *, sharded: bool = False, signed: bool = False, parts: Sequence[int] = ()
) -> Tensor:
    """Mask of the ``count`` smallest entries of ``scores`` ``(K, B)``; ties go to the earlier block, then the earlier step.

    With scores that do not decrease along a block, the selection is a prefix of every block. The exact threshold is found from
    two histograms of 65,536 bins, of the upper and the lower halves of the numbers' bits, so that processes need to
    exchange no scores.

    Args:
        scores: Float32, not negative unless ``signed``.
        count: Of all processes together, if ``sharded``.
        sharded: Every process has some of the blocks, in order of rank; all must call.
        signed: Scores may be negative.
        parts: How many consecutive entries belong to each target, if every process has some blocks of each: ties go to the earlier
            target, then the earlier process. Default: all are of one.
    """
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    total = scores.numel()
    if sharded:
        total = sum(distributed.gather_counts(total, scores.device))
    count = min(count, total)
    if count <= 0:
        return chosen
    keys = (scores.reshape(-1).float() + 0.0).view(torch.int32)  # as whole numbers in the same order; no negative zero
    if signed:
        keys = keys ^ ((keys >> 31) & 0x7FFFFFFF)
    first = -(2**15) if signed else 0
    upper, before = _bin_of((keys >> 16) - first, count, sharded)
    upper += first
    inside = keys[(keys >> 16) == upper] & 0xFFFF
    lower, below = _bin_of(inside, count - before, sharded)
    threshold = (upper << 16) | lower
    flat = chosen.view(-1)
    torch.lt(keys, threshold, out=flat)
    ties = (keys == threshold).nonzero().squeeze(1)
    wanted = count - before - below
    if not sharded:
        flat[ties[: max(0, wanted)]] = True
        return chosen
    ends = torch.tensor(list(parts) or [len(flat)], device=scores.device).cumsum(0)
    own = torch.searchsorted(ties, ends).diff(prepend=ends.new_zeros(1))
    counts = torch.stack(distributed.gather_tensors(own), dim=1)  # (targets, processes)
    earlier = counts.flatten().cumsum(0).view_as(counts)[:, distributed.rank()] - own
    for some, passed in zip(ties.split(own.tolist()), earlier.tolist(), strict=True):
        flat[some[: max(0, wanted - passed)]] = True
    return chosen


def _bin_of(keys: Tensor, count: int, sharded: bool) -> tuple[int, int]:
    """The key ``< 2**16`` that the ``count``-th smallest has, and how many are smaller than that."""
    histogram = torch.bincount(keys, minlength=2**16)
    if sharded:
        histogram = distributed.sum_over_ranks(histogram)
    sums = histogram.cumsum(0)
    found = int(torch.searchsorted(sums, count))
    return found, int(sums[found - 1]) if found else 0
