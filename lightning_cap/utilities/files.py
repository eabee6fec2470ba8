"""Files that are complete or absent, whatever happens."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
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
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to ``path`` when the body has succeeded and removed if it has not.

    The body may make a folder of files there; it takes the place of the whole folder that was at ``path``.

    What was written is on the disk before the renaming, so that it is whole after a power cut too. A process that is killed
    inside leaves its temporary file, hidden and under a name that nothing loads; the next writing in the folder removes it.

    Raises:
        OSError: The system refuses, as on a full disk; it names ``path``.
    """
    holder = path.with_name(
        f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    )  # a folder: some libraries write beside and rename too
    temporary = holder / "part"
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
                if temporary.is_dir() and path.exists():  # the system renames no folder over another
                    os.replace(path, holder / "before")
                os.replace(temporary, path)
            finally:
                shutil.rmtree(holder, ignore_errors=True)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


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
        if _TEMPORARY.fullmatch(temporary.name):
            with suppress(FileNotFoundError):  # another process has just renamed or removed it
                if older_than is None or temporary.stat().st_mtime < time.time() - older_than:
                    shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


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
