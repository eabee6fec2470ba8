"""Files that are complete or absent, whatever happens."""

from __future__ import annotations

import glob
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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


def save_json(path: Path, value: Any) -> None:
    """Write a JSON file in one piece."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
