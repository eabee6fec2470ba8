"""From marginal losses and a budget of zeros to how many weights each block loses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_cap import distributed
from lightning_cap.cpu.threads import over_blocks

Ranking = Literal["marginal", "cumulative"]


def budget_of(sparsity: float, numel: int) -> int:
    """Zeros that ``sparsity`` means: exactly ``floor(sparsity · numel + 0.5)``."""
    return int(sparsity * numel + 0.5)


def block_scores(losses: Tensor, ranking: Ranking) -> Tensor:
    """Score of every elimination, non-decreasing along each block, so that a threshold cuts it at a prefix.

    Args:
        losses: ``(K, B)`` marginal losses by step, infinite past a block's last step.
        ranking: ``"cumulative"``: the block's summed loss so far (algorithm 1, lines 8-9). ``"marginal"``: the slopes of the
            lower convex envelope of the block's loss curve (pool adjacent violators), which makes the total predicted
            loss least.

    Returns:
        ``(K, B)`` float32, infinite where ``losses`` is.
    """
    if ranking == "cumulative":
        # on the CPU: torch refuses a floating-point cumsum on CUDA where deterministic algorithms are asked for
        return losses.cpu().double().cumsum(-1).float().to(losses.device)
    return pool_adjacent_violators(losses)


def pool_adjacent_violators(values: Tensor) -> Tensor:
    """Least-squares non-decreasing fit of each row of ``values`` ``(k, B)``, as float32; infinite entries end a row."""
    if values.device.type != "cpu":
        return torch.cat([_pool_in_rounds(chunk) for chunk in values.split(2**13)])
    from lightning_cap.cpu.pools import pool_rows

    given, out = values.contiguous().numpy(), torch.empty(values.shape)
    over_blocks(lambda first, last: pool_rows(given, out.numpy(), first, last), len(values))
    return out


def _pool_in_rounds(values: Tensor) -> Tensor:
    """The same by whole-tensor operations, for a GPU.

    Every row keeps a stack of pools (sum, count); in each round a row either merges its two last pools, if they are out
    of order, or pushes its next value. Two rounds a value are enough.
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


class Allocation(ABC):
    """How the zeros of one model are shared out over its targets."""

    @abstractmethod
    def budgets(self, sizes: Mapping[str, int], existing: Mapping[str, int], zeros: int) -> list[tuple[list[str], int]]:
        """Split the total into budgets, each for some targets that compete for it.

        Args:
            sizes: Weights of each target.
            existing: Zeros that each target has already (they stay).
            zeros: Zeros in all, existing ones included, ``sum(existing) <= zeros <= sum(sizes)``.

        Returns:
            ``[(target names, zeros for them together, existing included)]``; every target in exactly one entry, the
            zeros add up to ``zeros``.
        """


@dataclass(frozen=True)
class Global(Allocation):
    """All weights of all targets compete."""

    def budgets(self, sizes: Mapping[str, int], existing: Mapping[str, int], zeros: int) -> list[tuple[list[str], int]]:
        """One budget for all."""
        return [(list(sizes), zeros)]


@dataclass(frozen=True)
class Uniform(Allocation):
    """Every target has the same sparsity, up to rounding (largest remainder) and zeros that it has already."""

    def budgets(self, sizes: Mapping[str, int], existing: Mapping[str, int], zeros: int) -> list[tuple[list[str], int]]:
        """One budget a target."""
        shares: dict[str, int] = {}
        open_targets = list(sizes)
        while True:  # a target with more zeros than its share keeps them; the others share the rest
            rest = zeros - sum(shares.values())
            split = _largest_remainder({name: sizes[name] for name in open_targets}, rest)
            full = [name for name in open_targets if split[name] < existing[name]]
            if not full:
                shares.update(split)
                return [([name], shares[name]) for name in sizes]
            shares.update({name: existing[name] for name in full})
            open_targets = [name for name in open_targets if name not in full]


def _largest_remainder(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Whole numbers proportional to ``sizes`` that add up to ``total``; earlier names win ties."""
    whole = sum(sizes.values())
    shares = {name: size * total // whole for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(sizes[name] * total % whole))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def smallest(scores: Tensor, count: int, *, sharded: bool = False) -> Tensor:
    """Mask of the ``count`` smallest entries of ``scores`` ``(K, B)``; ties go to the earlier block, then the earlier step.

    With scores that do not decrease along a block, the selection is a prefix of every block. The exact threshold is found from
    two histograms of 65,536 bins, of the upper and the lower halves of the numbers' bits, so that processes need to
    exchange no scores.

    Args:
        scores: Float32, not negative.
        count: Of all processes together, if ``sharded``.
        sharded: Every process has some of the blocks, in order of rank; all must call.
    """
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    total = scores.numel()
    if sharded:
        total = sum(distributed.gather_counts(total, scores.device))
    count = min(count, total)
    if count <= 0:
        return chosen
    keys = (scores.reshape(-1).float() + 0.0).view(torch.int32)  # as whole numbers in the same order; no negative zero
    upper, before = _bin_of(keys >> 16, count, sharded)
    inside = keys[(keys >> 16) == upper] & 0xFFFF
    lower, below = _bin_of(inside, count - before, sharded)
    threshold = (upper << 16) | lower
    flat = chosen.view(-1)
    torch.lt(keys, threshold, out=flat)
    ties = (keys == threshold).nonzero().squeeze(1)
    wanted = count - before - below
    if sharded:
        counts = distributed.gather_counts(len(ties), scores.device)
        wanted -= sum(counts[: distributed.rank()])
    flat[ties[: max(0, wanted)]] = True
    return chosen


def _bin_of(keys: Tensor, count: int, sharded: bool) -> tuple[int, int]:
    """The key ``< 2**16`` that the ``count``-th smallest has, and how many are smaller than that."""
    histogram = torch.bincount(keys, minlength=2**16)
    if sharded:
        histogram = distributed.sum_over_ranks(histogram)
    sums = histogram.cumsum(0)
    found = int(torch.searchsorted(sums, count))
    return found, int(sums[found - 1]) if found else 0
