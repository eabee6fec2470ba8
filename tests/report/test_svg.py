from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from lightning_cap.report.run_plots import accuracy_plot, figure
from lightning_cap.report.style import save
from lightning_cap.report.svg import INK, in_page_style, inline_svg


def drawing(path: Path, **look: Any) -> None:
    made, axes = in_page_style(figure)()
    axes.plot([0, 1], [0, 1], marker="o", **{"color": "#0072B2", **look})
    axes.set_title("<script>alert(1)</script> #0072b2")
    save(made, path)


def test_text_is_text_in_the_colour_of_the_page() -> None:
    text = inline_svg(drawing, "p1", 'a "title" & more')
    root = ElementTree.fromstring(text)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == root[0].text == 'a "title" & more'
    told = [element for element in root.iter("text") if element.text and "script" in element.text]
    assert told[0].text == "<script>alert(1)</script> #0072b2"
    assert "<script>" not in text
    assert "var(--ink)" in str(told[0].attrib["style"])
    assert "font-family" not in text


def test_lines_have_variables_for_colours_but_not_on_an_image() -> None:
    assert "stroke: var(--c1)" in inline_svg(drawing, "p1", "t")
    on_image = inline_svg(lambda path: drawing(path, color="black"), "p1", "t", on_image=True)
    assert "stroke: #000000" in on_image
    assert INK not in on_image


def test_two_plots_share_no_ids_and_refer_to_their_own() -> None:
    one, two = (inline_svg(drawing, name, "t") for name in ("a", "b"))
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (one, two)]
    assert not ids[0] & ids[1]
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', one))
    assert {found[0] or found[1] for found in used} <= ids[0]


def test_the_same_drawing_gives_the_same_text() -> None:
    lines = {"a": [(0.5, 0.9, 0.01), (0.75, 0.8, 0.02)]}
    once, again = (accuracy_plot("p", lines, {"dense": 0.95}, "acc", "sparsity", 100.0) for _ in range(2))
    assert once == again
    assert not re.search(r"\d{4}-\d\d-\d\d|matplotlib v", once, re.IGNORECASE)
