"""The records of a comparison on the disk, kept so that a comparison that was killed can go on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_cap.comparison.records import RESULTS, ComparisonRecord
from lightning_cap.utilities import distributed
from lightning_cap.utilities.records import known_records, write_records


class RecordStore:
    """Records by their fingerprint, in ``results.jsonl`` after each new one. Only rank 0 reads and writes files.

    Args:
        folder: Where to keep them, None for nowhere.
        order: Fingerprints of the records that are wanted, in the order in which they are to stand.

    Raises:
        DataError: There is a ``results.jsonl`` that holds something else.
    """

    def __init__(self, folder: Path | None, order: Sequence[str]) -> None:
        self._folder, self._order = folder, list(order)
        with distributed.raise_on_all_ranks(f"Reading {RESULTS}"):
            reads = distributed.rank() == 0
            found = known_records(folder / RESULTS, ComparisonRecord) if folder is not None and reads else []
        known = {record.fingerprint: record for record in found}
        wanted = {key: known[key] for key in order if key in known}
        self._records: dict[str, ComparisonRecord] = distributed.gather_objects(wanted)[0]

    def get(self, fingerprint: str, files: Collection[str] = ()) -> ComparisonRecord | None:
        """The record, if it is there with the files (by the names of its fields) that it must have."""
        record = self._records.get(fingerprint)
        here = record is not None and all(self.exists(getattr(record, field)) for field in files)
        return record if here else None

    def exists(self, name: str) -> bool:
        """Whether rank 0 has a file of this name in the folder; every process must ask."""
        here = bool(name) and self._folder is not None and (self._folder / name).is_file()
        return bool(distributed.gather_objects(here)[0])

    def add(self, record: ComparisonRecord) -> None:
        """Keep a record; on the disk when this returns."""
        self._records[record.fingerprint] = record
        self.save()

    def save(self) -> None:
        """Write the records that are wanted; every process must call it."""
        with distributed.raise_on_all_ranks("Saving the results"):
            if self._folder is not None and distributed.rank() == 0:
                write_records(self._folder / RESULTS, self.records())

    def records(self) -> list[ComparisonRecord]:
        """Those that there are, in the order in which they are to stand."""
        return [self._records[key] for key in self._order if key in self._records]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of names, shapes and values, the same in every run of the program."""
    found = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return found.hexdigest()
