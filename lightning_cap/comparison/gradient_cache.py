"""Gradient rows that are collected once and read by several pruners: from main memory, or from a file."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_cap.calibration.sources import SourceMemory, reading
from lightning_cap.errors import DataError
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from lightning_cap.utilities.files import save_json
from lightning_cap.utilities.memory import free_memory, is_out_of_memory, parse_bytes

_log = logging.getLogger(__name__)

_MEMORY_SHARE = 0.25  # of the free main memory
_DISK_SHARE = 0.5  # of the free space in the folder


class Chunks(Protocol):
    """This process's chunks, in main memory or in a file."""

    def begin(self) -> None:
        """Make a new place for chunks."""

    def add(self, chunk: Mapping[str, Tensor]) -> None:
        """Keep one more."""

    def end(self, index: Mapping[str, Any]) -> None:
        """Say that all are there, for a later run."""

    def read(self, number: int, rows: int) -> dict[str, Tensor]:
        """The first ``rows`` rows of a chunk, on the CPU."""

    def close(self) -> None:
        """Give the room back."""


class InMemory:
    """Chunks as tensors on the CPU."""

    def __init__(self) -> None:
        self._chunks: list[dict[str, Tensor]] = []

    def begin(self) -> None:
        """See `Chunks`."""

    def end(self, index: Mapping[str, Any]) -> None:
        """See `Chunks`; no later run can have them."""

    def add(self, chunk: Mapping[str, Tensor]) -> None:
        """See `Chunks`."""
        self._chunks.append({name: rows.cpu() for name, rows in chunk.items()})

    def read(self, number: int, rows: int) -> dict[str, Tensor]:
        """See `Chunks`."""
        return {name: whole[:rows] for name, whole in self._chunks[number].items()}

    def close(self) -> None:
        """See `Chunks`."""
        self._chunks.clear()


class InFile:
    """Chunks one after the other in a file, and in each the rows of one target after those of another, float32.

    Args:
        path: The file.
        sizes: Target name -> its shape.
        rows: Rows in each chunk; of a file that is complete.
    """

    def __init__(self, path: Path, sizes: Mapping[str, tuple[int, ...]], rows: Sequence[int] = ()) -> None:
        self._path, self._sizes, self._rows = path, dict(sizes), list(rows)
        self._numel = sum(torch.Size(shape).numel() for shape in sizes.values())

    def begin(self) -> None:
        """See `Chunks`."""
        _index_of(self._path).unlink(missing_ok=True)
        self._path.write_bytes(b"")

    def add(self, chunk: Mapping[str, Tensor]) -> None:
        """See `Chunks`."""
        with self._path.open("ab") as file:
            for name in self._sizes:
                chunk[name].cpu().contiguous().numpy().tofile(file)
        self._rows.append(next(iter(chunk.values())).shape[0])

    def end(self, index: Mapping[str, Any]) -> None:
        """See `Chunks`; all is on the disk when this returns."""
        with self._path.open("ab") as file:
            os.fsync(file.fileno())
        save_json(_index_of(self._path), dict(index))

    def read(self, number: int, rows: int) -> dict[str, Tensor]:
        """See `Chunks`."""
        place, out = 4 * self._numel * sum(self._rows[:number]), {}
        for name, shape in self._sizes.items():
            numel = torch.Size(shape).numel()
            values = np.fromfile(self._path, np.float32, rows * numel, offset=place)
            if len(values) < rows * numel:
                raise OSError(f"{self._path} ends too early")
            out[name] = torch.from_numpy(values).view(rows, *shape)
            place += 4 * self._rows[number] * numel
        return out

    def close(self) -> None:
        """See `Chunks`."""
        for path in (_index_of(self._path), self._path):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                _log.warning("%s cannot be removed: %s", path, error)


@dataclass(frozen=True)
class SharedRows:
    """A source that can be read again: the first ``most`` of the rows that were collected, in global order.

    Attributes:
        chunks: This process's own.
        counts: For each round the rows of each rank.
        most: Rows to give, over all ranks.
        devices: Where the rows of each target go.
        row_bytes: Of one row.
        seconds: What collecting all of them took.
    """

    chunks: Chunks
    counts: Sequence[Sequence[int]]
    most: int
    devices: Mapping[str, torch.device]
    row_bytes: int
    seconds: float

    repeatable = True

    @property
    def total(self) -> int:
        """Rows that were collected, over all ranks."""
        return sum(map(sum, self.counts))

    def memory(self) -> SourceMemory:
        """That of the largest chunk."""
        size = self.row_bytes * max((counts[distributed.rank()] for counts in self.counts), default=0)
        return SourceMemory(size, 0, size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rank, left = distributed.rank(), self.most
        for number, counts in enumerate(self.counts):
            if left <= 0:
                return
            own = min(counts[rank], max(0, left - sum(counts[:rank])))
            left -= sum(counts)
            yield self._read(number, own)

    def _read(self, number: int, own: int) -> dict[str, Tensor]:
        """A chunk on its devices. If a process cannot have its own, all raise `DataError`, and nothing is taken up again."""
        rows, error = {}, None
        try:
            rows = {name: part.to(self.devices[name]) for name, part in self.chunks.read(number, own).items()}
        except (OSError, MemoryError, RuntimeError) as caught:
            error = caught
        if any(distributed.gather_counts(int(error is not None), next(iter(self.devices.values())))):
            self.chunks.close()
            with distributed.raise_on_all_ranks("Reading the gradient rows"):
                if error is not None:
                    raise DataError(
                        f"gradient rows: they cannot be read again ({type(error).__name__}: {error}). Start the comparison again: "
                        "it goes on where it stopped and collects them anew."
                    ) from error
        return rows


def share(
    source: Iterable[Mapping[str, Tensor]],
    targets: Targets,
    num_gradients: int,
    folder: Path | None,
    key: str,
    max_memory: int | str | None,
) -> SharedRows | None:
    """Read a source once and keep its rows; every process must call it.

    Args:
        source: What to read; not touched if there is no room. If it raises, it does so on every process.
        targets: The weights that the rows belong to.
        num_gradients: Rows of all processes together.
        folder: Where a file may go, None for nowhere.
        key: What the rows depend on, for `find`.
        max_memory: Main memory that this process may take. Default: a quarter of what is free, shared by the processes.

    Returns:
        The rows, or None, on every process, if there is room for them neither in main memory nor on the disk of ``folder``, or
        if it turned out on one process that there is not.
    """
    room = _room(-(-num_gradients // distributed.world_size()) * 4 * targets.numel, folder, max_memory)
    if room is None:
        _log.info("No room for %d gradient rows; every pruner collects its own.", num_gradients)
        return None
    chunks: Chunks = InMemory() if room == "memory" or folder is None else InFile(_file(folder), _shapes(targets))
    own: list[int] = []
    error = _failure(chunks, chunks.begin)
    with reading(source) as given:
        for chunk in given if error is None or distributed.world_size() > 1 else ():
            own.append(next(iter(chunk.values())).shape[0])
            error = error or _failure(chunks, partial(chunks.add, chunk))
            if error is not None and distributed.world_size() == 1:
                break  # several processes read together, to the end
    seconds = float(getattr(source, "seconds", 0.0))
    index = {"key": key, "num_gradients": num_gradients, "rows": own, "seconds": seconds}
    error = error or _failure(chunks, partial(chunks.end, index))
    errors = distributed.gather_objects(error)
    if any(errors):
        chunks.close()
        _log.warning(
            "The gradient rows cannot be shared (%s); every pruner collects its own.", next(filter(None, errors))
        )
        return None
    return _shared(chunks, own, targets, num_gradients, seconds)


def _failure(chunks: Chunks, step: Callable[[], None]) -> str | None:
    """Take a step of keeping chunks; if there is no room for it or the disk fails, give back what there is, and say why."""
    try:
        step()
    except (OSError, MemoryError, RuntimeError) as error:
        if not isinstance(error, OSError) and not is_out_of_memory(error):
            raise
        chunks.close()
        return f"{type(error).__name__}: {error}"
    return None


def find(targets: Targets, num_gradients: int, folder: Path | None, key: str) -> SharedRows | None:
    """The rows that a run which was killed has left in a file, if every process has them; every process must call it.

    Args:
        targets: As for `share`.
        num_gradients: As for `share`; there may be more.
        folder: As for `share`.
        key: As for `share`; rows of another key are not taken up.
    """
    found = None
    if folder is not None:
        path = _file(folder)
        try:
            index = json.loads(_index_of(path).read_text())
            whole = path.stat().st_size == 4 * targets.numel * sum(index["rows"])
            if whole and index["key"] == key and index["num_gradients"] >= num_gradients:
                found = list(index["rows"]), float(index["seconds"])
        except (OSError, ValueError, KeyError):
            found = None
    everywhere = all(distributed.gather_objects(found is not None))
    if found is None or folder is None or not everywhere:
        return None
    return _shared(InFile(_file(folder), _shapes(targets), found[0]), found[0], targets, num_gradients, found[1])


def _shared(chunks: Chunks, own: list[int], targets: Targets, most: int, seconds: float) -> SharedRows:
    counts = [list(each) for each in zip(*distributed.gather_objects(own), strict=True)]
    devices = {name: weight.device for name, weight in targets.items()}
    return SharedRows(chunks, counts, most, devices, 4 * targets.numel, seconds)


def _index_of(path: Path) -> Path:
    """The file that says what a file of rows holds, and that it is complete."""
    return path.with_suffix(".json")


def _room(size: int, folder: Path | None, max_memory: int | str | None) -> str | None:
    """Where ``size`` bytes per process fit on all of them: ``"memory"``, ``"disk"`` or nowhere."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", distributed.world_size()))
    limit = parse_bytes(max_memory, "max_rows_memory")
    if limit is None:
        free = free_memory(torch.device("cpu"))
        limit = None if free is None else int(_MEMORY_SHARE * free / processes)
    in_memory, on_disk = limit is None or size <= limit, False
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            on_disk = size <= _DISK_SHARE * shutil.disk_usage(folder).free / processes
        except OSError as error:
            _log.warning("Gradient rows cannot be kept in %s: %s", folder, error)
    every = distributed.gather_objects((in_memory, on_disk))
    return _place(all(memory for memory, _ in every), all(disk for _, disk in every))


def place_of_rows(size: int, free: int | None, free_on_disk: int | None, max_memory: int | str | None) -> str:
    """Where `share` will keep ``size`` bytes of a process: ``"memory"``, ``"disk"``, or empty for nowhere.

    Args:
        size: Of the rows of one process.
        free: Main memory that is free for it; None where that is not known.
        free_on_disk: Likewise of the folder; None without one.
        max_memory: As for `share`.
    """
    limit = parse_bytes(max_memory, "max_rows_memory")
    if limit is None and free is not None:
        limit = int(_MEMORY_SHARE * free)
    on_disk = free_on_disk is not None and size <= _DISK_SHARE * free_on_disk
    return _place(limit is None or size <= limit, on_disk) or ""


def _place(in_memory: bool, on_disk: bool) -> str | None:
    return "memory" if in_memory else "disk" if on_disk else None


def _file(folder: Path) -> Path:
    return folder / f"rows-{distributed.rank()}-of-{distributed.world_size()}.bin"


def _shapes(targets: Targets) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in targets.items()}
