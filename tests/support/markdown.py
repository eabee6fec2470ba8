"""What a Markdown page says: blocks of code, commands, links, headings."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r'^(?:<!-- not run: (?P<reason>.+?) -->\n+)?```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        language: Behind the fence.
        title: Name of the file that it is; empty for none.
        code: What is in it.
        reason: Why a test does not run it; empty where it does.
        line: Of its fence, from 1.
    """

    language: str
    title: str
    code: str
    reason: str
    line: int


@dataclass(frozen=True)
class Page:
    """A Markdown file."""

    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[Block]:
        return [
            Block(
                found["language"], found["title"] or "", found["code"], found["reason"] or "", self._line(found.start())
            )
            for found in _BLOCK.finditer(self.text)
            if found["language"] == language
        ]

    def commands(self, program: str) -> list[list[str]]:
        """The arguments of each command that calls a program, in blocks of bash."""
        lines = [line for block in self.blocks("bash") for line in block.code.replace("\\\n", " ").splitlines()]
        words = [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]
        return [
            list(itertools.takewhile(lambda word: word != ">", command[1:]))
            for command in words
            if command[:1] == [program]
        ]

    def links(self) -> list[tuple[str, str]]:
        """Path and heading of each link that leads into the repository."""
        prose = _BLOCK.sub("", self.text)
        return _LINK.findall(prose)

    def headings(self) -> set[str]:
        """The headings, as links name them."""
        prose = _BLOCK.sub("", self.text)
        found = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}

    def _line(self, place: int) -> int:
        return self.text[:place].count("\n") + 1
