"""What a comparison makes beside its records: the loss surface of two solutions, and the average Fisher block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_cap.calibration.sources import GradientSource
from lightning_cap.comparison.fisher_block import average_blocks
from lightning_cap.comparison.records import SURFACE, SurfaceRecord
from lightning_cap.comparison.request import Request
from lightning_cap.comparison.surface import measure_surface
from lightning_cap.comparison.variants import Variant
from lightning_cap.errors import DataError
from lightning_cap.export.safetensors import save_plain_weights
from lightning_cap.healing.parts import ModelParts
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from lightning_cap.utilities.records import read_record, write_records


class Artifacts:
    """Which of them are wanted and not there yet, and their making. With the first seed, and pruners as given.

    Args:
        request: What to compare.
        targets: The weights.
        fingerprints: Of the records, by the variant's slug and the sparsity.
    """

    def __init__(self, request: Request, targets: Targets, fingerprints: Mapping[tuple[str, float], str]) -> None:
        self._request, self._targets = request, targets
        first = request.variants[0].seed
        self._as_given = [v for v in request.variants if v.setting is None and v.seed == first]
        self._fingerprints = fingerprints
        self._surface_fingerprint = self._block_fingerprint = self._block_of = ""
        self._surface_of: tuple[str, ...] = ()  # fingerprints of the records
        self.surface_wanted = self._surface_missing()
        self._block = self._block_missing()

    def block_reader(self, seed: int) -> Variant | None:
        """The pruner whose gradients the average block is made of, if it is still to be made with this seed."""
        return self._block if self._block is not None and self._block.seed == seed else None

    def save_block(self, rows: GradientSource) -> None:
        """Make the average block; every process must call it."""
        blocks = average_blocks(self._targets, rows, self._request.fisher_block)
        with distributed.raise_on_all_ranks("Saving the Fisher block"):
            if self._request.folder is not None and distributed.rank() == 0:
                path = self._request.folder / "fisher_block.safetensors"
                save_plain_weights(path, blocks, {"fingerprint": self._block_fingerprint, "of": self._block_of})

    def needs(self, variant: Variant, sparsity: float) -> bool:
        """Whether the surface that is to be drawn goes through this solution."""
        surface = self._request.surface
        if surface is None or not self.surface_wanted or variant not in self._as_given:
            return False
        return variant.name in surface.pruners and sparsity == surface.sparsity

    def save_surface(
        self,
        parts: ModelParts,
        weights: Callable[[Variant, float], Mapping[str, Tensor]],
        loss: Callable[[], float],
        progress: Callable[[int, int], None],
    ) -> None:
        """Take the loss over the plane; every process must call it.

        Args:
            parts: What differs between solutions.
            weights: Gives the solution of a variant at a sparsity.
            loss: Of the model as it is now.
            progress: ``progress(done, total)``.
        """
        surface, folder = self._request.surface, self._request.folder
        if surface is None or folder is None:
            return
        one, two = (weights(self._of(name), surface.sparsity) for name in surface.pruners)
        found = measure_surface(parts, (one, two), loss, surface, progress)
        with distributed.raise_on_all_ranks("Saving the loss surface"):
            if distributed.rank() == 0:
                record = replace(found, of=self._surface_of, fingerprint=self._surface_fingerprint)
                write_records(folder / SURFACE, [record])
        self.surface_wanted = False

    def _of(self, name: str) -> Variant:
        return next(variant for variant in self._as_given if variant.name == name)

    def _surface_missing(self) -> bool:
        surface, folder = self._request.surface, self._request.folder
        if surface is None or folder is None:
            return False
        self._surface_of = tuple(self._fingerprints[self._of(name).slug, surface.sparsity] for name in surface.pruners)
        self._surface_fingerprint = _short_hash([self._surface_of, surface.points, surface.batches, surface.margin])
        try:
            known = read_record(folder / SURFACE, SurfaceRecord).fingerprint
        except DataError:  # there is none, or it is to be made anew
            known = ""
        return bool(distributed.gather_objects(known != self._surface_fingerprint)[0])

    def _block_missing(self) -> Variant | None:
        folder, size = self._request.folder, self._request.fisher_block
        reader = next((variant for variant in self._as_given if variant.gradients is not None), None)
        if not size or folder is None or reader is None:
            return None
        self._block_of = self._fingerprints[reader.slug, self._request.sparsities[0]]
        self._block_fingerprint = _short_hash([self._block_of, size])
        try:
            with safe_open(folder / "fisher_block.safetensors", "pt") as file:
                known = (file.metadata() or {}).get("fingerprint", "")
        except (OSError, SafetensorError):
            known = ""
        return reader if distributed.gather_objects(known != self._block_fingerprint)[0] else None


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]
