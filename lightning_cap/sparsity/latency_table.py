"""The file of a table of times: what each part of a model takes at several widths, and what it was measured on."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_cap.sparsity.latency_passes import Counts
from lightning_cap.sparsity.units import Units
from lightning_cap.utilities.machine import Machine
from lightning_cap.utilities.records import Record, RecordError, read_record

_log = logging.getLogger(__name__)

_TILT = 0.02  # of a table's rise, spread evenly, so that every unit saves something


@dataclass(frozen=True)
class Conditions:
    """What times depend on.

    Attributes:
        machine: With its chips and its release of torch.
        device: E.g. ``"cpu"``.
        threads: Of torch on the CPU.
        batch_size: Samples in a forward pass.
        dtype: Of the parameters.
        model: Its class.
        fingerprint: Of its modules, shapes, units and inputs.
    """

    machine: Machine
    device: str
    threads: int
    batch_size: int
    dtype: str
    model: str
    fingerprint: str


@dataclass(frozen=True)
class PartTimes:
    """What some parts that are alike take.

    Attributes:
        modules: Their paths in the model, which is the empty one.
        groups: Of each: places, among the units, of the groups that its time depends on.
        widths: For each such group, numbers of units, rising.
        milliseconds: At all combinations of widths, those of the last group changing first.
    """

    modules: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    widths: tuple[tuple[int, ...], ...]
    milliseconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class LatencyTable(Record):
    """Times of all parts of a model, measured inside it.

    Attributes:
        conditions: Of the measurement.
        milliseconds: Of the whole dense model; what all parts take sums up to it.
        parts: Of the model.
    """

    kind: ClassVar[str] = "latency"
    version: ClassVar[int] = 1

    conditions: Conditions
    milliseconds: float
    parts: tuple[PartTimes, ...]


class TableTerm:
    """What a part takes, between the widths of its table by (bi)linear interpolation.

    Args:
        groups: Names of its groups, at most two.
        sizes: Units that each has.
        times: Its row of the table.
    """

    def __init__(self, groups: Sequence[str], sizes: Sequence[int], times: PartTimes) -> None:
        self.groups = tuple(groups)
        self._sizes, self._widths = tuple(sizes), times.widths
        self._grid = np.array(times.milliseconds).reshape([len(own) for own in times.widths]).tolist()

    def price(self, pruned: Mapping[str, int]) -> float:
        """Milliseconds with so many units of each group pruned."""
        value: Any = self._grid
        corners = [
            _between(widths, size - pruned.get(group, 0))
            for group, size, widths in zip(self.groups, self._sizes, self._widths, strict=True)
        ]
        if not corners:
            return float(value)
        if len(corners) == 1:
            low, share = corners[0]
            return float(_mix(value, low, share))
        (row, down), (column, right) = corners
        upper = _mix(value[row], column, right)
        return float(upper if down == 0 else (1 - down) * upper + down * _mix(value[row + 1], column, right))


def _between(widths: Sequence[int], width: int) -> tuple[int, float]:
    """Place of the largest width that is not above, and how far it is from there to the next."""
    low = max(0, min(bisect.bisect_right(widths, width) - 1, len(widths) - 1))
    if low == len(widths) - 1:
        return low, 0.0
    return low, (width - widths[low]) / (widths[low + 1] - widths[low])


def _mix(values: Sequence[float], low: int, share: float) -> float:
    return values[low] if share == 0 else (1 - share) * values[low] + share * values[low + 1]


def fingerprint(model: nn.Module, units: Units, shapes: Sequence[Sequence[int]]) -> str:
    """Of all that a model's times depend on but the values of its weights, and names.

    Args:
        model: The model.
        units: Its units.
        shapes: Of its inputs.
    """
    tensors = [(tuple(p.shape), str(p.dtype)) for p in itertools.chain(model.parameters(), model.buffers())]
    slices = [[(part.dim, part.index.tolist()) for part in (*g.slices, *g.buffers)] for g in units.values()]
    known = (str(model), tensors, [(g.kind, g.size) for g in units.values()], slices, [tuple(s) for s in shapes])
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def read_table(path: Path, wanted: Conditions, given: bool) -> LatencyTable | None:
    """The table of a file, if it is one that was measured under the same conditions; else None, and one line in the log says why.

    Args:
        path: The file; it may not be there.
        wanted: The conditions.
        given: Whether the user named the file, so that nothing else than a table may be written over.

    Raises:
        DataError: The file was given, and is damaged or something else.
    """
    if not path.exists():
        return None
    try:
        table = read_record(path, LatencyTable)
        _require_times(path, table)
    except RecordError as error:
        if given:
            raise
        _log.warning("%s: timing the layers anew.", error.reason)
        return None
    for field in fields(Conditions):
        then, now = getattr(table.conditions, field.name), getattr(wanted, field.name)
        if then != now:
            if isinstance(then, Machine):
                then, now = _told(then, now)
            _log.warning("%s was made on %s %s, not %s: timing the layers anew.", path, field.name, then, now)
            return None
    return table


def _require_times(path: Path, table: LatencyTable) -> None:
    for times in table.parts:
        cells = [len(widths) for widths in times.widths]
        whole = len(times.milliseconds) == int(np.prod(cells)) and len(times.modules) == len(times.groups)
        if not whole or any(len(places) != len(cells) for places in times.groups):
            raise RecordError(f"{path}: times of {times.modules[:1]} are missing in this table", "move the file away.")


def _told(then: Machine, now: Machine) -> tuple[str, str]:
    """Two machines by what tells them apart."""
    names = [field.name for field in fields(Machine) if getattr(then, field.name) != getattr(now, field.name)]
    return tuple(", ".join(str(getattr(one, name)) for name in names) for one in (then, now))  # type: ignore[return-value]


def grid_times(
    modules: Sequence[str],
    groups: Sequence[tuple[int, ...]],
    widths: Sequence[Counts],
    cells: Mapping[Counts, float],
) -> PartTimes:
    """Times of parts at all combinations of widths, such that fewer units never take longer.

    Args:
        modules: The parts.
        groups: Of each.
        widths: Of the groups.
        cells: ``{units of each group: milliseconds}``.
    """
    grid = np.array([cells[cell] for cell in itertools.product(*widths)]).reshape([len(own) for own in widths])
    rising = _tilted(_rising(np.minimum(grid, grid.flat[-1])), widths)
    return PartTimes(tuple(modules), tuple(groups), tuple(map(tuple, widths)), tuple(rising.flatten().tolist()))


def linear_times(
    modules: Sequence[str], groups: Sequence[tuple[int, ...]], sizes: Counts, cells: Mapping[Counts, float]
) -> list[PartTimes]:
    """Times of parts as a constant and what grows evenly with each of their groups, by least squares.

    Args:
        modules: The parts.
        groups: Of each.
        sizes: Units of the groups.
        cells: ``{units of each group: milliseconds}``, of any combinations.
    """
    from sklearn.linear_model import LinearRegression  # which takes long to import

    slopes, constant = np.zeros(len(sizes)), float(np.median(list(cells.values())))
    if sizes and len(cells) > 1:
        fit = LinearRegression(positive=True).fit(np.array(list(cells)) / sizes, list(cells.values()))
        slopes, constant = fit.coef_, max(0.0, float(fit.intercept_))
    rows = [PartTimes(tuple(modules), ((),) * len(modules), (), (constant,))]
    for role, (slope, size) in enumerate(zip(slopes.tolist(), sizes, strict=True)):
        if slope > 0 and size > 1:
            own = tuple((places[role],) for places in groups)
            rows.append(PartTimes(tuple(modules), own, ((1, size),), (slope / size, slope)))
    return rows


def _rising(grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """A table that nowhere falls along any dim: the mean of the least one above and of the greatest one below."""
    above, below = grid, grid
    for dim in range(grid.ndim):
        above = np.maximum.accumulate(above, axis=dim)
        below = np.flip(np.minimum.accumulate(np.flip(below, dim), axis=dim), dim)
    return (above + below) / 2


def _tilted(grid: NDArray[np.float64], widths: Sequence[Counts]) -> NDArray[np.float64]:
    """The same between the same ends along every dim, but nowhere flat where it rises at all."""
    for dim, own in enumerate(widths):
        if len(own) > 1:
            first, last = grid.take([0], dim), grid.take([-1], dim)
            share = (np.array(own, dtype=float) - own[0]) / (own[-1] - own[0])
            even = first + (last - first) * share.reshape([-1 if d == dim else 1 for d in range(grid.ndim)])
            grid = (1 - _TILT) * grid + _TILT * even
    return grid
