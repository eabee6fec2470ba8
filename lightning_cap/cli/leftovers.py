"""Folders that loggers make before anything is checked: of a run that is refused none is left."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.loggers import Logger

_OF_LOGGERS = {"hparams.yaml"}  # which they write even when a run has failed before its first step


def log_folders(loggers: Iterable[Logger]) -> list[Path]:
    """Where loggers write, as far as they tell."""
    places = (getattr(logger, "log_dir", None) for logger in loggers)
    return [Path(place).absolute() for place in places if isinstance(place, str) and "://" not in place]


def folders_to_come(loggers: Iterable[Logger]) -> list[Path]:
    """The topmost folder that each logger will make for its logs; of one whose folder is there already, none."""
    found = []
    for place in log_folders(loggers):
        missing = [folder for folder in (place, *place.parents) if not folder.exists()]
        found += missing[-1:]
    return found


def remove_unused(folders: Iterable[Path]) -> None:
    """Remove those of the folders in which there is nothing of a run."""
    for folder in folders:
        written = {path.name for path in folder.rglob("*") if not path.is_dir()}
        if folder.is_dir() and written <= _OF_LOGGERS:
            shutil.rmtree(folder)
