"""Removes what loggers have made for a run that was refused: a folder with nothing in it to read."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

_ABOUT_THE_RUN = ("hparams.yaml",)


def remove_empty_logs(trainer: pl.Trainer, since: float) -> None:
    """Have the log folder of a run that has logged nothing removed, and the folders above it that are then empty.

    That is done when the loggers have come to their end, which Lightning lets them do after ``on_exception``. A folder stays if it
    holds any file that is older than the run, or another one than loggers write before the first step.

    Args:
        trainer: Whose loggers have made the folder.
        since: Seconds since the epoch, before the run began.
    """
    home = Path(os.path.expanduser("~"))  # where there is none, it stays so
    kept = (Path.cwd(), home, Path(trainer.default_root_dir).resolve())
    for logger in trainer.loggers if trainer.is_global_zero else ():
        folder, root = getattr(logger, "log_dir", None), logger.save_dir
        if isinstance(folder, str) and root is not None and "://" not in folder and _is_new(Path(folder), since):
            _at_the_end(logger, partial(_remove, Path(folder), Path(root), kept))


def _at_the_end(logger: Logger, remove: Callable[[], None]) -> None:
    finalize = logger.finalize

    def finalize_and_remove(status: str) -> None:
        del logger.__dict__["finalize"]
        finalize(status)
        remove()

    logger.__dict__["finalize"] = finalize_and_remove


def _remove(folder: Path, root: Path, kept: Collection[Path]) -> None:
    for path in _files(folder) if _tells_nothing(folder) else ():
        path.unlink()
    places = [folder / "checkpoints", folder, *folder.parents]
    for place in places[: places.index(root) + 1] if root in places else ():
        with suppress(OSError):  # it is not empty, or not there
            if place.resolve() not in kept:
                place.rmdir()


def _is_new(folder: Path, since: float) -> bool:
    return _tells_nothing(folder) and all(path.stat().st_mtime >= since for path in _files(folder))


def _tells_nothing(folder: Path) -> bool:
    """Whether all files in a folder are such as this process has written before the first step."""
    own = f".{os.getpid()}."
    return all(
        path.name in _ABOUT_THE_RUN or (path.name.startswith("events.out.tfevents.") and own in path.name)
        for path in _files(folder)
    )


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]
