"""Files that are complete or absent: checkpoints, plain safetensors of a pruned model, JSON lines of events."""

from __future__ import annotations

import glob
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from safetensors.torch import save_file
from torch import Tensor, nn

_log = logging.getLogger(__name__)

_ABANDONED = 3600.0  # seconds without a write, after which a temporary file is that of a process that was killed


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to ``path`` when the body has succeeded and removed if it has not.

    What was written is on the disk before the renaming, so that it is whole after a power cut too. A process that is killed
    inside leaves its temporary file, hidden and under a name that nothing loads; a later writing of ``path`` removes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):  # another process has just renamed or removed it
            if temporary.stat().st_mtime < time.time() - _ABANDONED:
                temporary.unlink()


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


def save_plain_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state dict that anyone can load without this package.

    Args:
        path: The ``.safetensors`` file.
        state: Tensors by the model's own names; copied to the CPU, tied ones written twice.
        metadata: Strings for the file's header.
    """
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", **metadata})
        temporary.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def plain_model(module: nn.Module, target_names: list[str]) -> tuple[nn.Module, str]:
    """The model that a user would load, inside a LightningModule, and its name prefix there.

    A timm model that holds all targets; else the only child that holds all parameters; else the module itself.
    """
    candidates = [(name, child) for name, child in module.named_modules() if hasattr(child, "pretrained_cfg")]
    children = [(name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None]
    if len(children) == 1 and not any(True for _ in module.parameters(recurse=False)):
        candidates += children
    for name, child in candidates:
        prefix = f"{name}." if name else ""
        if all(target.startswith(prefix.replace("_orig_mod.", "")) for target in target_names):
            return getattr(child, "_orig_mod", child), prefix
    return module, ""


def append_json_line(path: Path, row: Mapping[str, Any], key: str = "epoch") -> None:
    """Add a record to a file of JSON lines, in one piece.

    Lines whose ``key`` is as high as this row's or higher are those of a run that was stopped after it and has gone back to a
    checkpoint before it: they are dropped, and so are torn ones. Each event then has one line.
    """
    kept = [line for line in _complete_lines(path) if key not in row or line.get(key, -1) < row[key]]
    with atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in [*kept, row]))


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            _log.warning("%s: a line is not JSON, as after a full disk; it is left out.", path)
    return [row for row in rows if isinstance(row, dict)]


def save_json(path: Path, value: Any) -> None:
    """Write a JSON file in one piece."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
