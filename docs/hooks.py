"""What mkdocs calls while it builds: formulas become MathML, and linked files of the repository part of the site."""

from __future__ import annotations

import logging
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
log = logging.getLogger("mkdocs.hooks.lightning_cap")

_LINK = re.compile(r"(\]\()((?:\.\./)+)([\w./=-]+)")  # [text](../configs/file.yaml), and up one more from docs/api
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_DRAWING = re.compile(r'<img alt="([^"]*)" src="(?:[\w./-]*/)?([\w-]+\.svg)" ?/?>')
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*rel=["']?(?:stylesheet|preconnect)[^>]*//"""
)


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository that pages link to, under their own paths: Markdown as pages, others as they are."""
    linked = {"benchmarks/RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    for page in files.documentation_pages():
        text = Path(page.abs_src_path or "").read_text(encoding="utf-8")
        linked |= {name for name in _outside(page.src_uri, text) if (ROOT / name).is_file()}
    for name in sorted(linked):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository, which lie above ``docs/``, lead to their copies in the site."""
    depth = page.file.src_uri.count("/")

    def inside(link: re.Match[str]) -> str:
        up, name = link[2], link[3]
        above = up.count("../") == depth + 1 and not page.file.generated_by
        return f"{link[1]}{'../' * depth if above else up}{name}"

    return _LINK.sub(inside, markdown)


def _outside(page: str, text: str) -> set[str]:
    up = page.count("/") + 1
    return {name for _, ups, name in _LINK.findall(text) if ups.count("../") == up}


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script; drawings inline, so that they take the page's colours."""
    return _DRAWING.sub(_inline, _FORMULA.sub(_mathml, html))


def _mathml(formula: re.Match[str]) -> str:
    return convert(unescape(formula[3]), display="block" if formula[2] == "[" else "inline")


def _inline(image: re.Match[str]) -> str:
    drawing = (ROOT / "docs" / "images" / image[2]).read_text(encoding="utf-8")
    named = drawing.replace("<svg ", f'<svg role="img" aria-label="{image[1]}" ', 1)
    return f'<div class="drawing">{named}</div>'


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Warn, which ends a strict build, of a page that would load something from elsewhere."""
    for found in _LOADED.findall(output):
        log.warning("%s loads from elsewhere: %s", page.file.src_uri, found)
    return output
