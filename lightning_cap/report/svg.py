"""Plots as SVG that is part of a page: its text is text, its colours are those of the page, light or dark."""

from __future__ import annotations

import re
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from markupsafe import Markup
from matplotlib import rc_context

from lightning_cap.report.style import COLORS

P = ParamSpec("P")
T = TypeVar("T")

INK = "#010203"  # of text
MUTED = "#595959"  # of axes and notes
FAINT = "#c9cacb"  # of what stands behind
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning-cap",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": MUTED,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_HEX = re.compile("#[0-9a-f]{6}")
_FONT = re.compile(r"font-family: [^;]*;? ?")
_OF_PAGE = {INK: "--ink", MUTED: "--muted", "#4c4c4c": "--muted", FAINT: "--faint"}
_OF_LINES = {"#ffffff": "--paper", **{color.lower(): f"--c{i}" for i, color in enumerate(COLORS, 1)}}


def in_page_style(draw: Callable[P, T]) -> Callable[P, T]:
    """Have a function draw with the sizes and colours of a page."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        with rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


@in_page_style
def inline_svg(draw: Callable[[Path], Any], name: str, title: str, on_image: bool = False) -> Markup:
    """What a function draws, to be put into a page. The same drawing gives the same text.

    Args:
        draw: Writes a figure to the path that it is given, see `lightning_cap.report.style.save`.
        name: Of the plot on its page, as a start of the ids in it: no other plot may have it.
        title: What the plot shows, for those who do not see it.
        on_image: Whether there is an image below: white and black stay as they are then, and so do the colours of lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plot.svg"
        draw(path)
        text = path.read_text()
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    colors = _OF_PAGE if on_image else {**_OF_PAGE, **_OF_LINES}
    for element in root.iter():
        _adapt(element, name, colors)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"class": "plot", "role": "img", "aria-label": title, "viewBox": box})
    root.set("style", f"--natural: {float(box.split()[2]) * 4 / 3:.0f}px")
    caption = ElementTree.Element("title")
    caption.text = title
    root.insert(0, caption)
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=True))


def _adapt(element: ElementTree.Element, name: str, colors: dict[str, str]) -> None:
    """Ids of this plot alone, colours and font of the page, and no room between elements."""
    element.tag = _local(element.tag)
    old = dict(element.attrib)
    element.attrib.clear()
    for key, value in old.items():
        short = _local(key)
        if short == "id":
            value = f"{name}-{value}"
        elif short == "href" and value.startswith("#"):
            value = f"#{name}-{value[1:]}"
        elif short == "clip-path":
            value = value.replace("url(#", f"url(#{name}-")
        elif short == "style":
            value = _HEX.sub(lambda found: f"var({colors[found[0]]})" if found[0] in colors else found[0], value)
            value = _FONT.sub("", value)
        element.set(short, " ".join(value.split()) if short == "d" else value)
    element.tail = element.tail if (element.tail or "").strip() else None
    element.text = element.text if (element.text or "").strip() else None


def _local(name: str) -> str:
    """A name without its namespace, which a page does not need."""
    return name.rpartition("}")[2]
