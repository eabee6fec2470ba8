"""Which order of channels lets N:M groups keep the most: swaps of two channels, the best ones first."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import require_whole, shown

_MOST = 2**31  # comparisons in a round: of wider layers fewer rows are looked at
_LEAST_GAIN = 1e-7  # of all that is kept, so that rounding cannot go round in circles


@torch.no_grad()
def best_order(scores: Tensor, keep: int, group: int) -> Tensor:
    """An order of channels in which groups keep more, from which no swap of two channels leads further.

    Greedy swaps of channels (Pool & Yu 2021, "Channel Permutations for N:M Sparsity"): in each round those of disjoint groups
    that gain the most. What a group keeps with channel ``c`` in the place of ``p`` is ``Σ max(x_c, t_p)`` and a constant, where
    ``t_p`` is the last score that the others alone would keep.

    Args:
        scores: ``(R, C)`` not negative; a row's groups are ``group`` channels next to one another.
        keep: Channels that a row keeps of each group, fewer than ``group``, which divides ``C``.
        group: Channels in a group.

    Returns:
        ``(C,)`` int64, on the CPU: the channel that each place gets.

    Raises:
        ConfigError: An argument is of the wrong kind, or ``group`` does not divide ``C``.
    """
    _check(scores, keep, group)
    rows, count = scores.shape
    step = max(1, -(-rows * count**2 // _MOST))
    x = scores[::step].T.contiguous().float()  # (C, R')
    x /= x.mean().clamp_min(torch.finfo(x.dtype).tiny)
    stripes = torch.arange(count, device=x.device).view(-1, group)
    places = stripes.clone()  # stripe -> its channels
    stripe_of = torch.arange(count, device=x.device) // group
    values = x.new_zeros(count, count)  # [p, c]: of the stripe of p with c in its place
    changed = torch.arange(len(places), device=x.device)
    while len(changed):
        _update(values, x, places[changed], keep)
        chosen = _swaps(values, stripe_of)
        for p, q in chosen:
            a, b = int(stripe_of[p]), int(stripe_of[q])
            places[a][places[a] == p], places[b][places[b] == q] = q, p
            stripe_of[p], stripe_of[q] = b, a
        changed = stripe_of[torch.tensor(chosen, dtype=torch.int64, device=x.device).flatten()].unique()
    return places.flatten().cpu()


def kept_score(scores: Tensor, keep: int, group: int) -> float:
    """What the groups of scores ``(R, C)`` keep in all. See `best_order`."""
    _check(scores, keep, group)
    return float(scores.unflatten(1, (-1, group)).topk(keep, dim=-1).values.sum(dtype=torch.float64))


def _check(scores: object, keep: object, group: object) -> None:
    require_whole("group", group, 2, example=4)
    require_whole("keep", keep, at_most=cast(int, group) - 1, example=2)
    if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.shape[1] % cast(int, group):
        raise ConfigError(f"scores={shown(scores)}: give a tensor (R, C) whose C is a multiple of group={group}.")


def _update(values: Tensor, x: Tensor, stripes: Tensor, keep: int) -> None:
    """The rows of ``values`` of all channels in some stripes ``(k, M)``."""
    work = torch.empty_like(x)
    for stripe in stripes:
        for place in range(len(stripe)):
            mates = torch.cat([stripe[:place], stripe[place + 1 :]])
            best = x[mates].topk(keep, dim=0).values  # (N, R)
            torch.sub(x, best[-1], out=work).clamp_min_(0)
            values[stripe[place]] = work.sum(1) + best.sum()


def _swaps(values: Tensor, stripe_of: Tensor) -> list[tuple[int, int]]:
    """Pairs of channels that gain by changing places, the best first, each stripe in one of them at most."""
    now = values.diagonal()
    gains = values + values.T - now - now.unsqueeze(1)
    gains.masked_fill_(stripe_of == stripe_of.unsqueeze(1), 0.0)
    least = _LEAST_GAIN * float(now.abs().sum())
    best, partner = gains.max(1)
    chosen: list[tuple[int, int]] = []
    used: set[int] = set()
    for p in best.argsort(descending=True, stable=True).tolist():
        if float(best[p]) <= least:
            break
        q = int(partner[p])
        stripes = {int(stripe_of[p]), int(stripe_of[q])}
        if not used & stripes:
            used |= stripes
            chosen.append((p, q))
    return chosen
