"""Every line of every table of bad input."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from lightning_cap.errors import ConfigError
from lightning_cap.pruners import CAP
from tests.support import bad_input
from tests.support.bad_input.table import Command, Line

ROOMS = [
    path.stem for path in sorted(Path(bad_input.__path__[0]).glob("*.py")) if path.stem not in ("__init__", "table")
]
TABLES: dict[str, list[Line | Command]] = {
    room: importlib.import_module(f"tests.support.bad_input.{room}").LINES for room in ROOMS
}
COMMANDS = [line for table in TABLES.values() for line in table if isinstance(line, Command)]


@pytest.mark.parametrize("room", ROOMS)
def test_bad_input_is_refused(room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All lines of a table one after another, each in a folder of its own; those that fail are told together."""
    failed = []
    for number, line in enumerate(line for line in TABLES[room] if isinstance(line, Line)):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        try:
            line.check(folder)
        except Exception as error:  # what is no error of ours, and what is not due
            failed.append(f"{line.name}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_bad_commands_are_refused(command: Command, tmp_path: Path) -> None:
    command.check(tmp_path)


def test_each_line_is_there_once() -> None:
    names = [line.name for table in TABLES.values() for line in table]
    assert len(names) == len(set(names))
    assert len(names) >= 300
    assert not [name for name in names if " at 0x" in name]  # as pytest-xdist's processes must agree on them


def test_a_line_can_fail(tmp_path: Path) -> None:
    """The table would tell what is accepted, what raises something else, and what is left behind."""
    made = Line("made", lambda folder: (folder / "left").touch() or CAP(block_size=0), ConfigError, ("block_size=0",))
    for line, words in (
        (Line("accepted", lambda _: CAP(), ConfigError, ()), "accepted"),
        (Line("words", lambda _: CAP(block_size=0), ConfigError, ("damp",)), "'damp' is not in"),
        (made, "left"),
    ):
        with pytest.raises(AssertionError, match=words):
            line.check(tmp_path)
    with pytest.raises(ZeroDivisionError):
        Line("raw", lambda _: 1 / 0, ConfigError, ()).check(tmp_path)
