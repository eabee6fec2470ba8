"""Checkpoints that are folders, as FSDP2 has them: complete or absent, whatever happens."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_cap.errors import DataError
from lightning_cap.trainer import compat
from lightning_cap.trainer.checkpoints import META
from lightning_cap.utilities import distributed
from lightning_cap.utilities.arguments import shown
from lightning_cap.utilities.files import atomic
from lightning_cap.utilities.sharded import local


class WholeFolders:
    """In place of the ``save_checkpoint`` of a strategy whose processes write the files of one folder together.

    Lightning has them write into the folder that is there: a kill leaves files of two checkpoints in it, which load. Here they
    write to a hidden folder beside it, which takes its place when all are done.

    Args:
        strategy: All its processes must see the same files.
    """

    def __init__(self, strategy: ModelParallelStrategy) -> None:
        self._strategy = strategy
        self._save = strategy.save_checkpoint

    def __call__(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint. Every process must call it; remote paths, and single files, are left to Lightning.

        Raises:
            OSError: It could not be written, or torch's ``CheckpointException``, on the process that failed; `CAPError` with its
                message on the others. What was at the path before is still there.
        """
        path = self._strategy.broadcast(str(filepath))
        if checkpoint.get("global_step") == 0:
            _forget_step(checkpoint.get("optimizer_states", []))
            _forget_step([optimizer.state_dict() for optimizer in self._strategy.optimizers])
        if storage_options is not None or "://" in path or not compat.writes_folders(self._strategy):
            self._save(checkpoint, path, storage_options)
            return
        told = f"Writing {path}"
        with ExitStack() as stack:
            temporary: Path | None = None
            with distributed.raise_on_all_ranks(told):
                if self._strategy.is_global_zero:
                    temporary = stack.enter_context(atomic(Path(path)))
            temporary = self._strategy.broadcast(temporary)
            with distributed.raise_on_all_ranks(told):
                self._save(checkpoint, temporary)  # type: ignore[arg-type]
            with distributed.raise_on_all_ranks(told):
                stack.close()  # where it gets its name


def _forget_step(states: list[dict[str, Any]]) -> None:
    """Undo what torch does to optimizers that are to be saved before their first step: a step of zeros, which Adam would count."""
    for state in states:
        for held in state.get("state", {}).values():
            moments = [value for name, value in held.items() if name != "step" and isinstance(value, torch.Tensor)]
            if isinstance(held.get("step"), torch.Tensor) and not any(local(moment).any() for moment in moments):
                held["step"].zero_()


def make_folders_whole(trainer: pl.Trainer) -> None:
    """Let a Trainer whose checkpoints are folders, in Lightning's own way, write them by `WholeFolders`."""
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy) or isinstance(strategy.save_checkpoint, WholeFolders):
        return
    if type(strategy).save_checkpoint is ModelParallelStrategy.save_checkpoint:
        strategy.save_checkpoint = WholeFolders(strategy)  # type: ignore[method-assign]


def read_folder(folder: Path) -> dict[str, Any]:
    """All of a checkpoint that processes with shares of a model have written together, as one that was saved in one file.

    torch unpickles parts of it, so that it must come from somebody who is trusted.

    Returns:
        As of Lightning's own checkpoints, on the CPU; states of optimizers go by names of parameters.

    Raises:
        DataError: It is not by `ModelParallelStrategy`.
    """
    # not before there is such a folder: it takes a while to import
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    known = FileSystemReader(folder).read_metadata()
    flat: dict[str, Any] = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype) if isinstance(kind, TensorStorageMetadata) else None
        for name, kind in known.state_dict_metadata.items()
    }
    alone = {"no_dist": True} if "no_dist" in inspect.signature(load).parameters else {}  # of torch >= 2.9
    load(flat, checkpoint_id=folder, **alone)
    held: dict[str, Any] = {}
    for name, value in flat.items():
        _put(held, known.planner_data[name], value)
    if "state_dict" not in held:
        raise DataError(
            f"ckpt_path={shown(str(folder))}: it has no 'state_dict', but {shown(list(held))}. Give a folder that "
            "ModelParallelStrategy has saved."
        )
    optimizers = [held[f"optimizer_{i}"] for i in range(len(held) - 1)]
    rest = torch.load(folder / META, map_location="cpu", weights_only=True)
    return {"state_dict": held["state_dict"], "optimizer_states": optimizers, **rest}


def _put(held: Any, path: tuple[Any, ...], value: Any) -> None:
    """Put a value to its place in nested dictionaries and lists, which are made."""
    *outer, last = path
    for key, following in zip(outer, path[1:], strict=True):
        held = _at(held, key, [] if isinstance(following, int) else {})
    _at(held, last, None)
    held[last] = value


def _at(held: Any, key: Any, default: Any) -> Any:
    if isinstance(held, list):
        held.extend([None] * (key + 1 - len(held)))
        held[key] = default if held[key] is None else held[key]
        return held[key]
    return held.setdefault(key, default)
