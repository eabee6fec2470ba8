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
from pathlib import Path
from typing import Any

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
