"""Checkpoint files that are complete or absent, whatever happens."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_cap.utilities.files import atomic


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, complete or absent on local disks whatever happens.

    Lightning writes to the system's folder for temporary files and moves the result. Where that is on another file system
    than the checkpoints, to move is to copy over the old checkpoint: a kill or a full disk then leaves half a file, and the
    old one is lost.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside ``path`` and rename. Remote paths are left to Lightning.

        Raises:
            OSError: It could not be written, as on a full disk; what was at ``path`` before is still there.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic(Path(path)) as temporary:
            _save(checkpoint, temporary)


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    data = BytesIO()  # torch's own writer hides what the system says of a full disk
    torch.save(checkpoint, data)
    path.write_bytes(data.getbuffer())


def make_checkpoints_atomic(trainer: pl.Trainer) -> None:
    """Let a Trainer that saves checkpoints in Lightning's own way do so by `AtomicCheckpointIO`."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
