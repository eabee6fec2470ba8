"""At which widths a model runs so that each of its parts is timed at all of its own, in few passes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lightning_cap.sparsity.latency_parts import Part

_LEVELS = 5  # widths of a group
_ODD_FROM = 32  # units

#: Units kept of each group, by its place.
Counts = tuple[int, ...]


def widths_of(size: int) -> tuple[int, ...]:
    """Numbers of units that a group of so many is timed at, rising: one, all, and about the quarters between.

    Between one and all they are odd in large groups: widths that are no multiples of 8 or 16 are slower, and those that pruning
    leaves are mostly of this kind, so that the table does not promise what only round widths give.
    """
    if size <= _LEVELS:
        return tuple(range(1, size + 1))
    quarters = [round(size * quarter / (_LEVELS - 1)) for quarter in range(1, _LEVELS - 1)]
    if size >= _ODD_FROM:
        quarters = [width - 1 + width % 2 for width in quarters]
    return tuple(sorted({1, *quarters, size}))


def plan_passes(parts: Sequence[Part], sizes: Sequence[int]) -> list[Counts]:
    """Widths of all groups in each pass, the first one dense, such that every part on a grid, or one like it, has all its cells.

    Groups that some part has both of get different colours. An orthogonal array of strength 2 then has every pair of
    widths of any two colours; groups of one colour are shifted against each other, so that parts alike, such as the blocks
    of a transformer, have different widths in one pass. Of its passes those are taken that add most cells.

    Args:
        parts: Of the model.
        sizes: Units of each group.
    """
    levels = [widths_of(size) for size in sizes]
    grids = [part for part in parts if part.on_grid]
    wanted = {(part.like, cell) for part in grids for cell in itertools.product(*(levels[g] for g in part.groups))}
    colours, shifts = _colours(parts, len(sizes)), _shifts(parts, len(sizes))
    candidates = []
    for row, column in itertools.product(range(_LEVELS), repeat=2):
        steps = [row if c == 0 else row * (c - 1) + column for c in colours]
        candidates.append(tuple(_at(own, step + shift) for own, step, shift in zip(levels, steps, shifts, strict=True)))
    passes = [tuple(sizes)]
    missing = wanted - _cells(grids, passes[0])
    while missing:
        best = max(candidates, key=lambda counts: len(missing & _cells(grids, counts)))
        if not missing & _cells(grids, best):  # more colours than the array has
            like, cell = min(missing)
            part = next(part for part in grids if part.like == like)
            here = dict(zip(part.groups, cell, strict=True))
            best = tuple(here.get(place, size) for place, size in enumerate(sizes))
        passes.append(best)
        missing -= _cells(grids, best)
    return passes


def cell_of(part: Part, counts: Counts) -> Counts:
    """Units of the part's own groups."""
    return tuple(counts[place] for place in part.groups)


def _cells(parts: Sequence[Part], counts: Counts) -> set[tuple[str, Counts]]:
    return {(part.like, cell_of(part, counts)) for part in parts}


def _at(widths: Sequence[int], step: int) -> int:
    """One of the widths: the wider ones of a small group come more often."""
    return widths[len(widths) - 1 - step % _LEVELS % len(widths)]


def _colours(parts: Sequence[Part], num_groups: int) -> list[int]:
    """A colour of each group: others than those of the groups that it shares a part with."""
    beside: list[set[int]] = [set() for _ in range(num_groups)]
    for part in parts:
        for place in part.groups:
            beside[place] |= set(part.groups) - {place}
    colours: list[int] = []
    for place in range(num_groups):
        taken = {colours[other] for other in beside[place] if other < place}
        colours.append(next(c for c in itertools.count() if c not in taken))
    return [colour % (_LEVELS + 1) for colour in colours]


def _shifts(parts: Sequence[Part], num_groups: int) -> list[int]:
    """How many groups have had the same role before, in parts alike."""
    shifts = [0] * num_groups
    seen: dict[tuple[str, int], list[int]] = {}
    for part in parts:
        for role, place in enumerate(part.groups):
            known = seen.setdefault((part.like, role), [])
            if place not in known:
                known.append(place)
            shifts[place] = max(shifts[place], known.index(place))
    return shifts
