"""Files that are complete or absent, whatever happens."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import shown

_ABANDONED = (
    3600.0  # seconds without a write, after which a temporary file is abandoned, where folders cannot be locked
)
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp")
_PART, _BEFORE = "part", "before"  # what is being written, and what had its name before


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to ``path`` when the body has succeeded and removed if it has not.

    The body may make a folder of files there; it takes the place of the whole folder that was at ``path``.

    What was written is on the disk before the renaming, so that it is whole after a power cut too. A process that is killed
    inside leaves its temporary file, hidden and under a name that nothing loads; the next writing in the folder removes it.

    Raises:
        OSError: The system refuses, as on a full disk; it names ``path``.
    """
    holder = _hidden(path)  # a folder: some libraries write beside and rename too
    temporary = holder / _PART
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _writing_in(path.parent):
            try:
                holder.mkdir()
                yield temporary
                for file in temporary.rglob("*") if temporary.is_dir() else (temporary,):
                    if not file.is_dir():
                        with file.open("rb+") as written:
                            os.fsync(written.fileno())
                _take_place(temporary, path)
            finally:
                shutil.rmtree(holder, ignore_errors=True)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _take_place(new: Path, path: Path) -> None:
    """Give what is in a holder its name. The system renames no folder over another, but on Linux two can change places."""
    folders = new.is_dir() or path.is_dir()
    if folders and os.path.lexists(path):
        if _exchange(new, path):
            return
        before = new.with_name(_BEFORE)
        os.replace(path, before)  # a kill right here leaves both; the next writing goes on from it
        try:
            os.replace(new, path)
        except BaseException:
            os.replace(before, path)
            raise
        return
    os.replace(new, path)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places at once; False where the system, or the file system, cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def remove_folder(path: Path) -> None:
    """Remove a folder that is there whole or not at all: a kill leaves a hidden one, which the next writing removes.

    Raises:
        OSError: The system refuses.
    """
    with _writing_in(path.parent):
        hidden = _hidden(path)
        os.replace(path, hidden)
        shutil.rmtree(hidden)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextmanager
def _writing_in(folder: Path) -> Iterator[None]:
    """Hold a shared lock on a folder. If nobody else does, the temporary files in it are abandoned, and removed before."""
    try:
        fcntl: Any = importlib.import_module("fcntl")
        held = os.open(folder, os.O_RDONLY)
    except (ImportError, PermissionError):  # Windows, which opens no folder either
        _remove_temporary(folder, older_than=_ABANDONED)
        yield
        return
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_temporary(folder)
            fcntl.flock(held, fcntl.LOCK_SH)
        except BlockingIOError:
            fcntl.flock(held, fcntl.LOCK_SH)  # waits while another one removes
        except OSError:  # a network folder without locks
            _remove_temporary(folder, older_than=_ABANDONED)
        yield
    finally:
        os.close(held)


def _remove_temporary(folder: Path, older_than: float | None = None) -> None:
    for temporary in folder.glob(".*.tmp"):
        found = _TEMPORARY.fullmatch(temporary.name)
        if found:
            with suppress(FileNotFoundError):  # another process has just renamed or removed it
                if older_than is None or temporary.stat().st_mtime < time.time() - older_than:
                    _finish(temporary, folder / found[1])
                    shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def _finish(holder: Path, path: Path) -> None:
    """Give a folder its name, where the process was killed right after the old one lost it."""
    if (holder / _BEFORE).exists() and (holder / _PART).exists() and not os.path.lexists(path):
        os.replace(holder / _PART, path)


def require_writable(argument: str, value: object, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to. Nothing is left behind.

    Args:
        argument: What to name.
        value: Of the argument.
        folder: Made for a moment, with its parents, if it is not there.

    Raises:
        ConfigError: The system refuses.
    """
    missing: list[Path] = []
    try:
        missing += [place for place in (folder, *folder.parents) if not os.path.exists(place)]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{argument}={shown(value)}: {str(folder)!r} cannot be written to ({reason}). Give a folder that can."
        ) from None
    finally:
        for place in missing:
            with suppress(OSError, ValueError):
                place.rmdir()


def save_json(path: Path, value: Any) -> None:
    """Write a JSON file in one piece."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
