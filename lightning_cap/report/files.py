"""Links from a page to files, relative, so that a folder can be moved with its page."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

from lightning_cap.report.parts import Link
from lightning_cap.report.texts import NOTHING, size


class FileLinks:
    """Makes links from the page.

    Args:
        page: The file that has them.
    """

    def __init__(self, page: Path) -> None:
        self._folder = page.resolve().parent

    def to(self, path: Path, text: str | None = None) -> Link:
        """To a file, by its name or another text; without an address where it is not there."""
        shown = path.name if text is None else text
        if not path.exists():
            return Link(shown, None)
        try:
            relative = os.path.relpath(path.resolve(), self._folder)
        except ValueError:  # another drive
            return Link(shown, path.resolve().as_uri())
        return Link(shown, quote(Path(relative).as_posix()))

    def size(self, path: Path) -> str:
        """Of a file, or of all in a folder."""
        if not path.exists():
            return NOTHING
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        return size(sum(file.stat().st_size for file in files))
