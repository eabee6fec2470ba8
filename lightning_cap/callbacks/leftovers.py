"""Removes what loggers have made for a run that was refused: a folder with nothing in it to read."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as pl

_ABOUT_THE_RUN = ("hparams.yaml", "config.yaml")


def remove_empty_logs(trainer: pl.Trainer, since: float) -> None:
    """Remove the log folder of a run that has logged nothing, and the folders above it that are then empty.

    A folder stays if it holds any file that is older than the run, or another one than Lightning's loggers and command line
    write before the first step.

    Args:
        trainer: Whose loggers have made the folder.
        since: Seconds since the epoch, before the run began.
    """
    for logger in trainer.loggers if trainer.is_global_zero else ():
        folder, root = getattr(logger, "log_dir", None), logger.save_dir
        if not isinstance(folder, str) or root is None or "://" in folder:
            continue
        for path in _made_at_once(Path(folder), since):
            path.unlink()
        places = [Path(folder) / "checkpoints", Path(folder), *Path(folder).parents]
        for place in places[: places.index(Path(root)) + 1] if Path(root) in places else ():
            with suppress(OSError):  # it is not empty, or not there
                if place.resolve() not in (Path.cwd(), Path.home(), Path(trainer.default_root_dir).resolve()):
                    place.rmdir()


def _made_at_once(folder: Path, since: float) -> list[Path]:
    """The files in a folder, if this process has made them all and none tells of a step."""
    inside = [path for path in folder.rglob("*") if not path.is_dir()]
    own = f".{os.getpid()}."
    known = [
        p for p in inside if p.name in _ABOUT_THE_RUN or (p.name.startswith("events.out.tfevents.") and own in p.name)
    ]
    return inside if len(known) == len(inside) and all(p.stat().st_mtime >= since for p in inside) else []
