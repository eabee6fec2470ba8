"""Checkpoint files that are complete or absent, whatever happens."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_cap.callbacks.checkpoint_folders import make_folders_whole, read_folder
from lightning_cap.trainer import compat
from lightning_cap.trainer.checkpoints import check_checkpoint, check_weights, is_folder
from lightning_cap.utilities import distributed
from lightning_cap.utilities.files import atomic, remove_folder

_REMOVAL = object()  # in place of storage options, where a file is to be removed in turn


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, complete or absent on local disks whatever happens.

    Lightning writes to the system's folder for temporary files and moves the result. Where that is on another file system
    than the checkpoints, to move is to copy over the old checkpoint: a kill or a full disk then leaves half a file, and the
    old one is lost.

    Args:
        module: The LightningModule that checkpoints are to be loaded into; those of another model are refused before.
    """

    def __init__(self, module: pl.LightningModule | None = None) -> None:
        super().__init__()
        self._module = module
        self._queue: AsyncCheckpointIO | None = None
        self._failed = False

    def write_behind(self, queue: AsyncCheckpointIO) -> None:
        """Be what ``queue`` writes by. An old checkpoint is then removed when the new one is there, and not if that failed."""
        self._queue = queue

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside ``path`` and rename. Remote paths are left to Lightning.

        Raises:
            OSError: It could not be written, as on a full disk; what was at ``path`` before is still there.
        """
        if storage_options is _REMOVAL:
            if not self._failed:
                self._remove(path)
            return
        self._failed = True  # until it is written
        self._write(checkpoint, path, storage_options)
        self._failed = False

    def _write(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic(Path(path)) as temporary:
            _save(checkpoint, temporary)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file or a folder; where another thread writes, when it has written what was given to it before."""
        if self._queue is None:
            self._remove(path)
        else:
            self._queue.save_checkpoint({}, path, storage_options=_REMOVAL)

    def _remove(self, path: Any) -> None:
        if "://" not in str(path) and Path(path).is_dir() and not Path(path).is_symlink():
            remove_folder(Path(path))
        else:
            super().remove_checkpoint(path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint as Lightning does, once it is known to be one; also a folder of FSDP2, on any number of processes.

        Raises:
            DataError: It is none, or holds objects that could run code, unless ``weights_only=False`` says that it is trusted.
        """
        if kwargs.get("weights_only") is not False:
            check_checkpoint(path, folders=True)
        folder = "://" not in str(path) and is_folder(Path(path))
        held: dict[str, Any] = read_folder(Path(path)) if folder else super().load_checkpoint(path, *args, **kwargs)
        module = self._module
        if module is not None and module.strict_loading and not is_overridden("on_load_checkpoint", module):
            check_weights(path, held.get("state_dict", {}), module)
        return held


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    data = BytesIO()  # torch's own writer hides what the system says of a full disk
    torch.save(checkpoint, data)
    path.write_bytes(data.getbuffer())


def make_checkpoints_atomic(trainer: pl.Trainer) -> None:
    """Let a Trainer that saves checkpoints in Lightning's own way do so by `AtomicCheckpointIO`; in `AsyncCheckpointIO` too, and
    in folders by `WholeFolders`.
    """
    make_folders_whole(trainer)
    outer = trainer.strategy.checkpoint_io
    ours = AtomicCheckpointIO(trainer.lightning_module)
    if type(outer) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = ours
    elif type(outer) is AsyncCheckpointIO and type(outer.checkpoint_io) is TorchCheckpointIO:
        compat.refuse_unsafe_async_io(outer)
        ours.write_behind(outer)
        compat.set_inner_checkpoint_io(outer, ours)


class _Deferred(CheckpointIO):
    """Keeps what went wrong in writing, until all processes have come to the end of it."""

    def __init__(self, inner: CheckpointIO) -> None:
        self._inner = inner
        self.error: Exception | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            self._inner.save_checkpoint(checkpoint, path, storage_options)
        except Exception as error:
            self.error = error

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._inner.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self._inner.remove_checkpoint(path)


def save_checkpoint(trainer: pl.Trainer, path: str) -> None:
    """Have the Trainer write a checkpoint, and wait for it. What goes wrong in it is raised on all ranks. Call it on every rank.

    Raises:
        OSError: It could not be written, on the process that writes; `CAPError` with its message on the others.
    """
    inner = trainer.strategy.checkpoint_io
    trainer.strategy.checkpoint_io = deferred = _Deferred(inner)
    try:
        trainer.save_checkpoint(path, weights_only=False)
    finally:
        trainer.strategy.checkpoint_io = inner
    with distributed.raise_on_all_ranks(f"Writing {path}"):
        if deferred.error is not None:
            raise deferred.error
        if isinstance(inner, AsyncCheckpointIO):
            inner.teardown()  # waits; the next checkpoint sets it up again
