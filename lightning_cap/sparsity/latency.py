"""Milliseconds of a model as a goal: predicted from a table of times that is measured on this machine."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_cap.errors import ConfigError, UnsupportedError
from lightning_cap.sparsity.cost import Shapes, UnitCost, require_shapes
from lightning_cap.sparsity.latency_parts import Call, Part, find_parts
from lightning_cap.sparsity.latency_passes import plan_passes, widths_of
from lightning_cap.sparsity.latency_table import (
    Conditions,
    LatencyTable,
    PartTimes,
    TableTerm,
    fingerprint,
    grid_times,
    linear_times,
    read_table,
)
from lightning_cap.sparsity.latency_timing import Measured, measure
from lightning_cap.sparsity.unit_prices import UnitPrices
from lightning_cap.sparsity.units import Units
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import require_instance, require_path, require_whole, shown
from lightning_cap.utilities.compiled import plain_module
from lightning_cap.utilities.machine import require_device, this_machine
from lightning_cap.utilities.progress import Progress
from lightning_cap.utilities.records import write_records
from lightning_cap.utilities.timing import Clock, quartiles, torch_threads

_log = logging.getLogger(__name__)

TABLE = "latency.json"


class Latency(UnitCost):
    """Milliseconds that a forward pass of the whole model takes, as predicted from times of its parts on this machine.

    Parts are the largest modules whose time depends on one group of units, or on two together. They are timed inside the model,
    while copies of it run at about five widths of each group, in turns; the median counts. Between widths a part is
    interpolated linearly, and it never gets slower with fewer units. What modules compute between their parts is taken to be
    linear in their groups. What no group changes is constant.

    The table is kept in a file, with the machine, the device, the threads, the batch size, the dtype and the model that it is of.
    It is used again where all of these are the same, and made anew, which is said, where they are not. A damaged file in the
    folder of the run is made anew likewise; one that was given as ``table`` is refused.

    Args:
        device: Where the model is to be fast: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; not necessarily where it trains.
        batch_size: Samples in a forward pass.
        table: File of the table. Default: ``latency.json`` in the folder of the run, or none where there is no run.
        threads: Of torch on the CPU. Default: as they are set.

    Raises:
        ConfigError: An argument is something else, or there is no such device.
    """

    name: ClassVar[str] = "latency"

    def __init__(
        self,
        device: str = "cpu",
        batch_size: int = 1,
        table: str | PathLike[str] | None = None,
        threads: int | None = None,
    ) -> None:
        require_device("device", device)
        require_whole("batch_size", batch_size, example=32)
        require_path("table", table, TABLE, optional=True)
        if table is not None and Path(table).is_dir():
            raise ConfigError(
                f"table={shown(table)}: this is a folder. Give the name of a file in it, such as {TABLE}."
            )
        if threads is not None:
            require_whole("threads", threads, example=4)
        self.device, self.batch_size, self.table, self.threads = device, batch_size, table, threads
        self._times: LatencyTable | None = None
        self._clock: Clock = time.perf_counter

    def __repr__(self) -> str:
        return f"Latency(device={self.device!r}, batch_size={self.batch_size}, table={self.table!r}, threads={self.threads})"

    def prepare(self, model: nn.Module, units: Units, example_input: Any, folder: Path | None = None) -> None:
        """Read the table, or time the parts of the model. Every rank must call it; rank 0 measures for all.

        Args:
            model: The model that gets ``example_input``; left as it is.
            units: Of the model. Their names may differ from those given to `unit_prices`, their order may not.
            example_input: As for `Units.from_model`; samples are repeated to the batch size.
            folder: Of the run, for the table.

        Raises:
            ConfigError: An argument is something else.
            DataError: The file that was given as ``table`` is damaged, or something else.
            UnsupportedError: The model cannot be copied, or cannot run shrunk or with this batch size.
        """
        require_instance("model", model, nn.Module, "the torch model that the units are of")
        require_instance("units", units, Units, "Units.from_model(model, example_input)")
        require_instance("folder", folder, Path, "Path('runs/a')", optional=True)
        path = Path(self.table) if self.table is not None else None if folder is None else folder / TABLE
        found: dict[str, Any] | None = None
        with distributed.raise_on_all_ranks("Timing the layers"):
            if distributed.rank() == 0:
                found = self._table(model, units, example_input, path).to_json()
        self._times = LatencyTable.from_json(distributed.gather_objects(found)[0])

    def unit_prices(self, units: Units, shapes: Shapes) -> UnitPrices:
        """Predicted milliseconds by how many units of each group are kept.

        Raises:
            ConfigError: `prepare` was not called, or with other units.
        """
        require_instance("units", units, Units, "targets.units")
        require_shapes(shapes)
        if self._times is None:
            raise ConfigError(f"cost={self!r}: nothing is timed yet. Call prepare(model, units, example_input) before.")
        names, sizes = list(units), list(units.sizes.values())
        terms, constant = [], 0.0
        for times in self._times.parts:
            _require_sizes(self, times, sizes)
            if not times.widths:
                constant += len(times.modules) * times.milliseconds[0]
                continue
            terms += [
                TableTerm([names[place] for place in groups], [sizes[place] for place in groups], times)
                for groups in times.groups
            ]
        return UnitPrices(units, terms, constant, "ms")

    def _table(self, model: nn.Module, units: Units, example_input: Any, path: Path | None) -> LatencyTable:
        device = require_device("device", self.device)
        replica, example = _copied(model, device), _Example(example_input, device)
        with torch_threads(self.threads) as threads, torch.inference_mode():
            dtype = next((str(p.dtype).removeprefix("torch.") for p in replica.parameters()), "float32")
            conditions = Conditions(
                machine=this_machine(device),
                device=str(device),
                threads=threads,
                batch_size=self.batch_size,
                dtype=dtype,
                model=type(replica).__name__,
                fingerprint=fingerprint(replica, units, example.shapes),
            )
            table = None if path is None else read_table(path, conditions, given=self.table is not None)
            if table is None:
                table = _timed(replica, units, example, conditions, self._clock)
                if path is not None:
                    write_records(path, [table])
        return table


def _require_sizes(cost: Latency, times: PartTimes, sizes: Sequence[int]) -> None:
    for groups in times.groups:
        for place, widths in zip(groups, times.widths, strict=True):
            if place >= len(sizes) or widths[-1] != sizes[place]:
                raise ConfigError(f"cost={cost!r}: it has timed a model with other units. Call prepare with these.")


def _copied(model: nn.Module, device: torch.device) -> nn.Module:
    try:
        replica: nn.Module = copy.deepcopy(plain_module(model)).to(device).eval()
    except Exception as error:
        raise UnsupportedError(
            f"model={type(model).__name__}: it is timed on copies, but cannot be copied to {device} ({type(error).__name__}: "
            f"{shown(str(error))}). Make copy.deepcopy(model) work."
        ) from error
    return replica


class _Example:
    """What the model gets, at several batch sizes."""

    def __init__(self, example_input: Any, device: torch.device) -> None:
        leaves = [t for t in pytree.tree_leaves(example_input) if isinstance(t, Tensor)]
        if not leaves or not leaves[0].dim() or not len(leaves[0]):
            raise ConfigError(
                f"example_input={shown(example_input)}: there is no tensor with a batch in it. Give a batch as the model takes it, "
                "such as torch.randn(1, 3, 224, 224)."
            )
        self._batch, self._device, self._input = len(leaves[0]), device, example_input
        self.shapes = [leaf.shape[1:] for leaf in leaves]

    def call(self, batch_size: int) -> Call:
        """A forward pass on so many samples."""

        def resized(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.dim() and len(leaf) == self._batch:
                leaf = leaf[torch.arange(batch_size, device=leaf.device) % self._batch]
            return leaf.detach().to(self._device)

        given = pytree.tree_map(resized, self._input)
        if isinstance(given, Mapping):
            return lambda model: model(**given)
        return lambda model: model(given) if isinstance(given, Tensor) else model(*given)


def _timed(model: nn.Module, units: Units, example: _Example, conditions: Conditions, clock: Clock) -> LatencyTable:
    begun = time.monotonic()
    call = example.call(conditions.batch_size)
    try:
        call(model)
    except Exception as error:
        raise UnsupportedError(
            f"batch_size={conditions.batch_size}: the model does not run with it ({type(error).__name__}: "
            f"{shown(str(error))}). Give a batch size that it takes."
        ) from error
    parts = find_parts(model, units, example.call(1))
    passes = plan_passes(parts, list(units.sizes.values()))
    with _bar() as progress:
        measured = measure(
            model, units, parts, passes, call, device=torch.device(conditions.device), progress=progress, clock=clock
        )
    table = build_table(parts, units, measured, conditions)
    _log.info(
        "Timed %d parts of %s, %d of them unlike, in copies of %d sizes and %.0f s: %.4g ms at batch %d on %s, %d threads.",
        len(parts), conditions.model, len({part.like for part in parts}), len(passes), time.monotonic() - begun, table.milliseconds,
        conditions.batch_size, conditions.machine.accelerator or conditions.machine.processor, conditions.threads,
    )  # fmt: skip
    return table


def build_table(parts: Sequence[Part], units: Units, measured: Measured, conditions: Conditions) -> LatencyTable:
    """Medians of all times, less what the taking of times takes.

    A part is so short that other work of the machine interrupts few of its calls, so that the sum is that of a machine at rest.

    Args:
        parts: Of the model.
        units: Its units.
        measured: What they took.
        conditions: Of the measurement.
    """
    sizes = tuple(units.sizes.values())
    taking = max(0.0, quartiles(measured.overhead)[1]) / len(parts)  # the same for each part, whatever its widths
    alike: dict[str, list[Part]] = {}
    for part in parts:
        alike.setdefault(part.like, []).append(part)
    rows: list[PartTimes] = []
    for like, members in alike.items():
        cells = {
            cell: max(quartiles(own)[1] - taking, 0.0) for (other, cell), own in measured.parts.items() if other == like
        }
        modules, groups = [member.module for member in members], [member.groups for member in members]
        own = tuple(sizes[place] for place in groups[0])
        if members[0].on_grid:
            rows.append(grid_times(modules, groups, [widths_of(size) for size in own], cells))
        else:
            rows += linear_times(modules, groups, own, cells)
    total = sum(len(row.modules) * row.milliseconds[-1] for row in rows)
    return LatencyTable(conditions=conditions, milliseconds=total, parts=tuple(rows))


@contextmanager
def _bar() -> Iterator[Progress]:
    """On standard error, gone at the end."""
    bar = RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=4,
    )
    with bar:
        task = bar.add_task("timing layers", total=None)
        yield lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total)
