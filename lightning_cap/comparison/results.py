"""The rows of a comparison and the files that belong to them, kept so that a comparison that was killed can go on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_cap.export.safetensors import save_plain_weights
from lightning_cap.utilities import distributed
from lightning_cap.utilities.bits import pack_bits, unpack_bits
from lightning_cap.utilities.files import save_json

_log = logging.getLogger(__name__)

#: One line of the results; plain Python values.
Row = dict[str, Any]


class Results:
    """Rows by their fingerprint, in ``results.json`` after each new one. Only rank 0 reads and writes files.

    Args:
        folder: Where to keep them, None for nowhere.
        order: Fingerprints of the rows that are wanted, in the order in which they are to stand.
    """

    def __init__(self, folder: Path | None, order: Sequence[str]) -> None:
        self._folder, self._order = folder, list(order)
        own = load_rows(folder / "results.json") if folder is not None and distributed.rank() == 0 else {}
        known: dict[str, Row] = distributed.gather_objects({key: own[key] for key in order if key in own})[0]
        self._rows = known

    def get(self, fingerprint: str, files: Sequence[str] = ()) -> Row | None:
        """The row, if it is there with the files (named by its entries) that it must have."""
        row = self._rows.get(fingerprint)
        return row if row is not None and all(self.exists(row.get(file) or "") for file in files) else None

    def exists(self, name: str) -> bool:
        """Whether rank 0 has a file of this name in the folder; every process must ask."""
        here = bool(name) and self._folder is not None and (self._folder / name).is_file()
        return bool(distributed.gather_objects(here)[0])

    def add(self, row: Row) -> None:
        """Keep a row; on the disk when this returns."""
        self._rows[row["fingerprint"]] = row
        self.save()

    def save(self) -> None:
        """Write the rows that are wanted; every process must call it."""
        with distributed.raise_on_all_ranks("Saving the results"):
            if self._folder is not None and distributed.rank() == 0:
                save_json(self._folder / "results.json", self.rows())

    def rows(self) -> list[Row]:
        """Those that there are, in the order in which they are to stand."""
        return [self._rows[key] for key in self._order if key in self._rows]


def load_rows(path: Path) -> dict[str, Row]:
    """Rows by their fingerprint; none if there is no such file, or (which is logged) no JSON in it."""
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text())
    except ValueError:
        _log.warning("%s is not JSON and is written anew.", path)
        return {}
    return {row["fingerprint"]: row for row in rows if isinstance(row, dict) and "fingerprint" in row}


def save_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks bit-packed, eight weights a byte."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    save_plain_weights(
        path, {n: pack_bits(mask.flatten().cpu()) for n, mask in masks.items()}, {"shapes": json.dumps(shapes)}
    )


def load_masks(path: Path) -> dict[str, Tensor]:
    """What `save_masks` wrote: ``{target: bool (*shape)}``."""
    with safe_open(path, "pt") as file:
        shapes = json.loads(file.metadata()["shapes"])
        return {
            name: unpack_bits(file.get_tensor(name), torch.Size(shape).numel()).view(shape)
            for name, shape in shapes.items()
        }


def intersection_over_union(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Weights that both masks keep over those that at least one keeps (section 4.1); 1 where neither keeps any."""
    both = sum(int((mask & other[name]).sum()) for name, mask in one.items())
    either = sum(int((mask | other[name]).sum()) for name, mask in one.items())
    return both / either if either else 1.0


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of names, shapes and values, the same in every run of the program."""
    found = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return found.hexdigest()
