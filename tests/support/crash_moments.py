"""For `crash_run.py`: the moments at which a run can be killed, and other mishaps, put into the code that runs."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch.plugins import TorchCheckpointIO
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import lightning_cap.callbacks.checkpoint_io as checkpoint_io
import lightning_cap.callbacks.event_log as event_log
import lightning_cap.export.safetensors as plain_weights
import lightning_cap.export.sharded as sharded_weights
import lightning_cap.pruners.blockwise as blockwise_module
import lightning_cap.pruners.blockwise_path as path_module
import lightning_cap.utilities.files as files
from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.calibration.sharded_rows import ShardedRowComputer
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.shards import BlockShards
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.sharded import local
from tests.support.toy import Toy

# their names in the package are the functions
eliminate_module, reconstruct_module = (sys.modules[f"lightning_cap.solver.{n}"] for n in ("eliminate", "reconstruct"))


class Moments:
    """Counts the moments of each phase; dies by SIGKILL at the planned one.

    Args:
        phase: Of the planned moment, empty for none.
        nth: Which of its moments, from 1.
        everyone: Folder of the trial, to kill all of its processes at once; None for this one alone.
    """

    def __init__(self, phase: str, nth: int, everyone: Path | None) -> None:
        self.counts: Counter[str] = Counter()
        self._phase, self._nth, self._everyone = phase, nth, everyone

    def reach(self, phase: str, half: Callable[[], object] | None = None) -> None:
        """A moment of ``phase``; ``half`` does half of what begins here, and is called only to die after it."""
        self.counts[phase] += 1
        if phase == self._phase and self.counts[phase] == self._nth:
            if half is not None:
                half()
            self.die()

    def die(self) -> NoReturn:
        everyone = {int(file.read_text()) for file in self._everyone.glob("pid-*.txt")} if self._everyone else set()
        for pid in everyone - {os.getpid()}:
            os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def around(owner: Any, name: str, reach: Callable[[], object]) -> None:
    """A moment right before each call, and one right after it."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        reach()
        out = original(*args, **kwargs)
        reach()
        return out

    setattr(owner, name, call)


def install(moments: Moments, folder: Path, elsewhere: bool) -> None:
    """Put the moments into the code that runs."""
    for phase, owner, name in (
        ("train", torch.optim.AdamW, "step"),
        ("validate", Toy, "validation_step"),
        ("solve", eliminate_module, "_eliminate_chunk"),
        ("reconstruct", blockwise_module, "reconstruct"),
        ("exchange", path_module, "gather_rows"),
        ("log", event_log, "append_record"),
        ("export", plain_weights, "append_record"),
        ("remove", TorchCheckpointIO, "remove_checkpoint"),
        ("remove", checkpoint_io, "remove_folder"),
        ("collect", ShardedRowComputer, "row"),
        ("exchange", BlockShards, "exchange"),
        ("write checkpoint", FileSystemWriter, "write_data"),  # of a folder: files of one rank and not of another,
        ("write checkpoint", FileSystemWriter, "finish"),  # then without and with a list of what is in them
        ("write weights", sharded_weights, "whole"),
        ("rename", files, "_exchange"),
        ("load", TorchCheckpointIO, "load_checkpoint"),
    ):
        around(owner, name, lambda phase=phase: moments.reach(phase))
    _install_event(moments)
    _install_files(moments, folder)
    if elsewhere:
        _install_border(moments)


def _install_border(moments: Moments) -> None:
    """As if every folder were a file system of its own: files cannot be renamed from one into another, only copied."""
    rename, replace, copy = os.rename, os.replace, shutil.copyfile

    def place(path: Any) -> Path:
        folder = Path(path).parent
        return folder.parent if folder.suffix == ".tmp" else folder  # made in it for a moment, so on the same one

    def within(move: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any) -> None:
            if place(source) != place(target):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            move(source, target)

        return call

    def counted_copy(source: Any, target: Any, **kwargs: Any) -> Any:
        half = Path(source).read_bytes()[: Path(source).stat().st_size // 2]
        moments.reach("copy", lambda: Path(target).write_bytes(half))
        return copy(source, target, **kwargs)

    os.rename, os.replace, shutil.copyfile = within(rename), within(replace), counted_copy


def _install_event(moments: Moments) -> None:
    rows, restore, update = GradientCollector._rows, Targets.restore, MaskSet.update

    def counted_rows(self: GradientCollector, batch: Any, most: int) -> Iterator[Any]:
        for chunk in rows(self, batch, most):
            moments.reach("collect")
            yield chunk

    def restore_one_by_one(self: Targets, weights: Any) -> None:
        for name, weight in weights.items():
            moments.reach(
                "apply", lambda name=name, weight=weight: local(self[name].detach())[0].copy_(local(weight)[0])
            )
            restore(self, {name: weight})

    def update_one_by_one(self: MaskSet, masks: Any) -> None:
        for name, mask in masks.items():
            moments.reach("masks")
            update(self, {name: mask})

    GradientCollector._rows = counted_rows  # type: ignore[method-assign]
    Targets.restore = restore_one_by_one  # type: ignore[method-assign]
    MaskSet.update = update_one_by_one  # type: ignore[method-assign]


def _install_files(moments: Moments, folder: Path) -> None:
    """Half of every file's bytes, and right before and after it gets its name, however it is written."""
    save, save_file, write, replace, move = (
        checkpoint_io._save, plain_weights.save_file, LocalFileOpener.write, os.replace, shutil.move,
    )  # fmt: skip

    def half_save(value: Any, path: Path) -> None:
        save(value, path)
        half_file(path)

    def counted_save(value: Any, path: Path) -> None:
        moments.reach("write checkpoint", lambda: half_save(value, path))
        save(value, path)

    def half_file(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def counted_weights(tensors: Any, path: Path, *args: Any) -> None:
        save_file(tensors, path, *args)
        moments.reach("write weights", lambda: half_file(path))

    def counted_write(self: LocalFileOpener, data: bytes) -> Any:
        moments.reach("write checkpoint", lambda: (write(self, data[: len(data) // 2]), self.flush()))
        return write(self, data)

    def counted(rename: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            ours = folder in Path(os.fsdecode(target)).parents
            moments.reach("rename") if ours else None
            out = rename(source, target, *args, **kwargs)
            moments.reach("rename") if ours else None
            return out

        return call

    checkpoint_io._save, plain_weights.save_file = counted_save, counted_weights
    LocalFileOpener.write = counted_write
    os.replace, shutil.move = counted(replace), counted(move)


def limit_memory(blocks: int) -> None:
    """Let the solver take no more than so many blocks at once."""
    solve, shift = eliminate_module._eliminate_chunk, reconstruct_module.reconstruct_numba

    def check(chosen: torch.Tensor) -> None:
        if len(chosen) > blocks:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def scarce_solve(kernel: Any, fisher: Any, chosen: torch.Tensor, *args: Any) -> None:
        check(chosen)
        solve(kernel, fisher, chosen, *args)

    def scarce_shift(fisher: Any, chosen: torch.Tensor, *args: Any) -> torch.Tensor:
        check(chosen)
        return shift(fisher, chosen, *args)

    eliminate_module._eliminate_chunk, reconstruct_module.reconstruct_numba = scarce_solve, scarce_shift
