"""What a page is made of, with texts instead of numbers; the templates lay it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Link:
    """A file.

    Attributes:
        text: What is read.
        href: Where it is, from the page; None where it is no longer there.
    """

    text: str
    href: str | None


Cell = str | Link | Sequence[Link]


@dataclass(frozen=True)
class Table:
    """Lines of cells.

    Attributes:
        header: Of the columns.
        rows: The lines, as long as the header.
        title: Above it.
        words: So many columns on the left hold words; the others hold numbers.
        folded: Whether it is shown only when its title is clicked, and in print.
    """

    kind: ClassVar[str] = "table"

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    words: int = 1
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """A plot.

    Attributes:
        svg: Of it.
        caption: Below it.
        wide: Whether it needs the whole width of the page, and scrolls where that is too little.
    """

    kind: ClassVar[str] = "picture"

    svg: Markup
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Pictures:
    """Plots beside each other, where there is room."""

    kind: ClassVar[str] = "pictures"

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Note:
    """A line that tells what is missing or has to be known."""

    kind: ClassVar[str] = "note"

    text: str


@dataclass(frozen=True)
class Tile:
    """A number that is read first: what it is of, the number, and lines on it."""

    label: str
    value: str
    more: Sequence[str] = ()


@dataclass(frozen=True)
class Tiles:
    """The numbers that are read first."""

    kind: ClassVar[str] = "tiles"

    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Source:
    """A text file, as it is."""

    kind: ClassVar[str] = "source"

    title: str
    text: str


@dataclass(frozen=True)
class Facts:
    """Names and what belongs to them; ``wide`` where that is a long text."""

    kind: ClassVar[str] = "facts"

    entries: Sequence[tuple[str, Cell]]
    title: str = ""
    wide: bool = False


Part = Facts | Table | Picture | Pictures | Note | Tiles | Source


@dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Chapter:
    """All about one run or comparison.

    Attributes:
        title: Its name.
        lead: What it is, in a sentence.
        state: Such as ``"finished"``; empty for a comparison.
        sections: In their order.
    """

    title: str
    lead: str
    state: str
    sections: Sequence[Section]
