"""Every line of every table of bad input."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.support import bad_input
from tests.support.bad_input.table import Command, Line

ROOMS = [
    path.stem for path in sorted(Path(bad_input.__path__[0]).glob("*.py")) if path.stem not in ("__init__", "table")
]
TABLE: list[Line | Command] = [
    line for room in ROOMS for line in importlib.import_module(f"tests.support.bad_input.{room}").LINES
]


@pytest.mark.parametrize("line", TABLE, ids=lambda line: line.name)
def test_bad_input_is_refused(line: Line | Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line.check(tmp_path)


def test_each_line_is_there_once() -> None:
    names = [line.name for line in TABLE]
    assert len(names) == len(set(names))
    assert not [name for name in names if " at 0x" in name]  # as pytest-xdist's processes must agree on them
