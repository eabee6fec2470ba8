"""The records of a comparison on the disk, kept so that a comparison that was killed can go on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from lightning_cap.comparison.records import MASKS, RESULTS, ComparisonRecord
from lightning_cap.utilities import distributed
from lightning_cap.utilities.records import known_records, write_records

Place = tuple[str, int | None, float]


class RecordStore:
    """The records in ``results.jsonl``, written after each new one. Only rank 0 reads and writes files.

    Records that nobody asks for this time stay, as long as what they depend on is the same. A new record takes the place of one
    with the same label, seed and sparsity, or the same file of masks.

    Args:
        folder: Where to keep them, None for nowhere.
        order: The places of the records that are wanted, in the order in which they are to stand.
        holds: Says of what a record depends on whether it is still so.

    Raises:
        DataError: There is a ``results.jsonl`` that holds something else.
    """

    def __init__(self, folder: Path | None, order: Sequence[Place], holds: Callable[[Mapping[str, str]], bool]) -> None:
        self._folder, self._order = folder, list(order)
        with distributed.raise_on_all_ranks(f"Reading {RESULTS}"):
            reads = distributed.rank() == 0
            found = known_records(folder / RESULTS, ComparisonRecord) if folder is not None and reads else []
        found = distributed.gather_objects(found)[0]
        self._records: dict[Place, ComparisonRecord] = {r.place: r for r in found if holds(r.depends)}
        kept = {record.masks for record in self._records.values()}
        self._stale = {r.masks for r in found if r.masks not in kept and _is_ours(r.masks)}

    def get(self, place: Place) -> ComparisonRecord | None:
        """The record of a place, if there is one."""
        return self._records.get(place)

    def exists(self, name: str) -> bool:
        """Whether rank 0 has a file of this name in the folder; every process must ask."""
        here = bool(name) and self._folder is not None and (self._folder / name).is_file()
        return bool(distributed.gather_objects(here)[0])

    def add(self, record: ComparisonRecord) -> None:
        """Keep a record; on the disk when this returns."""
        for place, other in list(self._records.items()):
            if record.masks and other.masks.lower() == record.masks.lower():
                del self._records[place]
            elif record.weights and other.weights == record.weights:
                self._records[place] = replace(other, weights="")
        before = self._records.get(record.place)
        if before is not None and _is_ours(before.masks):  # a goal that counted something else has another name
            self._stale.add(before.masks)
        self._records[record.place] = record
        self._stale.discard(record.masks)
        self.save()

    def discard_stale(self) -> None:
        """Remove the masks of records that do not hold any more; every process must call it."""
        with distributed.raise_on_all_ranks("Removing masks of earlier records"):
            if self._folder is not None and distributed.rank() == 0:
                for name in self._stale:
                    (self._folder / name).unlink(missing_ok=True)

    def save(self) -> None:
        """Write all records, those that are wanted first; every process must call it."""
        with distributed.raise_on_all_ranks("Saving the results"):
            if self._folder is not None and distributed.rank() == 0:
                others = [record for place, record in self._records.items() if place not in self._order]
                write_records(self._folder / RESULTS, [*self.records(), *others])

    def records(self) -> list[ComparisonRecord]:
        """Those that are wanted and there, in the order in which they are to stand."""
        return [self._records[place] for place in self._order if place in self._records]

    def all(self) -> list[ComparisonRecord]:
        """Those that are not wanted this time, too."""
        return list(self._records.values())


def _is_ours(masks: str) -> bool:
    return PurePosixPath(masks).parent == PurePosixPath(MASKS)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of names, shapes and values, the same in every run of the program."""
    found = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return found.hexdigest()
