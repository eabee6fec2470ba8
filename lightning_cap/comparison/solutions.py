"""Pruned weights that an earlier run has left beside the masks, so that nothing is solved again for what is measured of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lightning_cap.comparison.record_store import digest
from lightning_cap.comparison.records import ComparisonRecord, load_masks, load_weights
from lightning_cap.errors import DataError
from lightning_cap.utilities import distributed

_log = logging.getLogger(__name__)


class Solutions:
    """Reads the pruned weights of records, and what else was changed for them. Only rank 0 reads files.

    Args:
        folder: Of the comparison, None for none.
        before: Weights, and all else that changes, before pruning.
    """

    def __init__(self, folder: Path | None, before: Mapping[str, Tensor]) -> None:
        self._folder, self._before = folder, before

    def load(self, record: ComparisonRecord) -> dict[str, Tensor] | None:
        """The weights of a record on every process, None if they are not to be had; every process must call it."""
        found = self._found(record) if distributed.rank() == 0 else None
        if not distributed.gather_objects(found is not None)[0]:
            return None
        given = self._before if found is None else found
        weights = {name: given.get(name, value).to(value.device, copy=True) for name, value in self._before.items()}
        for name in weights:
            distributed.broadcast(weights[name])
        return weights

    def _found(self, record: ComparisonRecord) -> dict[str, Tensor] | None:
        """As they were written; or the weights before, masked, where the pruner has changed nothing else."""
        if self._folder is None or not record.masks:
            return None
        path = self._folder / record.masks
        try:
            weights = load_weights(path)
            if not weights:
                masks = load_masks(path)
                weights = {name: self._before[name].cpu().masked_fill(~mask, 0) for name, mask in masks.items()}
        except (DataError, KeyError, RuntimeError) as error:
            _log.warning("The weights of %s at %g are not taken up: %s", record.label, record.goal, error)
            return None
        return weights if digest(weights) == record.solution else None
