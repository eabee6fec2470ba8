"""What a line of the table is, and how it is tried. Nothing may be left behind, in the folder or in the process."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_cap.errors import CAPError, ConfigError
from lightning_cap.healing import LayerwiseHeal
from lightning_cap.pruners import CAP
from lightning_cap.utilities.arguments import shown
from tests.support.processes import in_fresh_process


@dataclass(frozen=True)
class Line:
    """One bad input.

    Attributes:
        name: Identifies it among all.
        run: Given an empty folder, which is the working directory too, does what is to be refused.
        error: What is due.
        words: What its message must hold.
        prepare: Given the same folder before, makes what is there already.
    """

    name: str
    run: Callable[[Path], Any]
    error: type[CAPError]
    words: tuple[str, ...]
    prepare: Callable[[Path], Any] = lambda folder: None

    def check(self, folder: Path) -> None:
        """Try it in a folder, which may hold files already."""
        self.prepare(folder)
        before, state = files(folder), _state()
        try:
            self.run(folder)
        except self.error as error:
            message = str(error)
        else:
            raise AssertionError(f"{self.name}: accepted")
        for word in self.words:
            assert word in message, f"{word!r} is not in: {message}"
        assert "\n" not in message, message
        assert files(folder) == before, f"left behind: {files(folder).keys() ^ before.keys()}"
        assert _state() == state, "the process is not as it was"


def wrong(
    make: Callable[..., Any], argument: str, *values: Any, error: type[CAPError] = ConfigError, words: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> list[Line]:  # fmt: skip
    """A line per wrong value of an argument of ``make``, whose message names the argument and the value.

    Args:
        make: A class or function.
        argument: The name of one of its keyword arguments.
        values: Each wrong.
        error: What is due.
        words: What the messages must hold besides.
        given: Its other keyword arguments.
    """

    def line(value: Any) -> Line:
        named = f"{argument}={shown(value)}"
        return Line(
            f"{make.__name__}({re.sub(' at 0x[0-9a-f]+', '', named)})",  # the same in every process
            lambda _: make(**{**(given or {}), argument: value}),
            error,
            (named, *words),
        )

    return [line(value) for value in values]


#: What is given where a number belongs.
NO_NUMBERS: tuple[Any, ...] = ("3", None, True, [3], {"a": 1}, float("nan"), float("inf"), 1j, object, torch.ones(2))
#: What is given where a whole number of at least 1 belongs.
#: What is no ``heal``.
NO_HEALS: tuple[Any, ...] = (
    "rows",
    "LAYERWISE",
    3,
    True,
    [],
    {"num_inputs": 3},
    LayerwiseHeal,
    object,
    CAP,
    torch.ones(2),
)
NO_COUNTS: tuple[Any, ...] = (*NO_NUMBERS, 32.0, 0.5, 0, -1)


@dataclass(frozen=True)
class Command:
    """One bad command line: it ends with one line on standard error, and leaves nothing behind.

    Attributes:
        name: Identifies it among all.
        args: Of ``lightning-cap``; ``{folder}`` stands for the working directory.
        words: What the line must hold.
        files: What is in the working directory, by name.
        environment: Variables that are set, or, where None, are not.
    """

    name: str
    args: Sequence[str]
    words: tuple[str, ...]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    environment: Mapping[str, str | None] = field(default_factory=dict)

    def check(self, folder: Path) -> None:
        """Try it in an empty folder, in a process that has imported everything."""
        work = folder / "work"
        work.mkdir()
        for name, content in self.files.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        before = files(work)
        args = [argument.replace("{folder}", str(work)) for argument in self.args]
        code, told = in_fresh_process(folder, run_command, str(work), args, dict(self.environment))
        lines = [line for line in told.splitlines() if line.strip()]
        assert code == 2, f"ended with {code}: {told}"
        assert len(lines) == 1, told
        assert lines[0].startswith("lightning-cap: error: ")
        for word in self.words:
            assert word in lines[0], f"{word!r} is not in: {lines[0]}"
        assert files(work) == before


def run_command(folder: str, args: list[str], environment: Mapping[str, str | None]) -> tuple[Any, str]:
    """Exit code and standard error of ``lightning-cap``, called in this process."""
    from lightning_cap.cli import main

    os.chdir(folder)
    for name, value in environment.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    sys.argv = ["lightning-cap", *args]
    told = io.StringIO()
    code: Any = 0
    with contextlib.redirect_stderr(told):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return code, told.getvalue()


def files(folder: Path) -> dict[str, bytes | None]:
    """What is in a folder: contents by name, None for folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def _state() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.initial_seed(),
        hash(random.getstate()),
        np.random.get_state()[1].tobytes(),  # type: ignore[index]
        threading.active_count(),
    )
