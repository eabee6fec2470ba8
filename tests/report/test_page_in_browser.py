"""A page as a headless Chromium shows it: light, dark, on a telephone, in print; without scripts and without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_cap.report import write_report
from tests.support.browser import browser
from tests.support.report_runs import LAYERS, add_export, add_finetuned, write_comparison, write_run

pytestmark = pytest.mark.xdist_group("browser")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two runs and a comparison, with long names."""
    folder = tmp_path_factory.mktemp("runs")
    one = write_run(
        folder / f"a_run_with_{'long_' * 12}name", settings={"pruner": "CAP", "long": "x" * 300}, layers=LAYERS
    )
    (one / "config.yaml").write_text(f"model: {'y' * 400}\n")
    add_finetuned(one)
    add_export(one, f"{'long_' * 15}.onnx")
    return write_report([one, write_run(folder / "two"), write_comparison(folder / "three")])


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


class Shown:
    """A page that is open, and what it asked for and told."""

    def __init__(self, chromium: Any, path: Path, width: int = 1200, **look: Any) -> None:
        self.context = chromium.new_context(viewport={"width": width, "height": 800}, **look)
        self.page = self.context.new_page()
        self.told: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.told.append(message.text))
        self.page.on("pageerror", lambda error: self.told.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Shown:
        return self

    def __exit__(self, *args: object) -> None:
        self.context.close()

    def style(self, selector: str, name: str) -> str:
        return str(self.page.eval_on_selector(selector, f"element => getComputedStyle(element)['{name}']"))


def brightness(color: str) -> float:
    """Of ``rgb(1, 2, 3)``, from 0 to 1."""
    numbers = [float(number) for number in color[color.index("(") + 1 : -1].split(",")[:3]]
    return sum(numbers) / 3 / 255


def test_it_loads_nothing_and_tells_no_errors(chromium: Any, report: Path) -> None:
    with Shown(chromium, report) as shown:
        shown.page.wait_for_load_state("networkidle")
        assert [url for url in shown.asked if not url.startswith("data:")] == [report.as_uri()]
        assert shown.told == []


def test_it_can_be_read_without_scripts(chromium: Any, report: Path) -> None:
    with Shown(chromium, report, java_script_enabled=False) as shown:
        assert shown.page.get_by_role("heading", level=1).inner_text() == "3 runs side by side"
        assert shown.page.get_by_role("img", name="val/acc over sparsity").first.is_visible()
        details = shown.page.locator("details").first
        table = details.locator("table")
        assert not table.is_visible()
        details.locator("summary").click()
        assert table.is_visible()


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_the_page_does_not_scroll_sideways(chromium: Any, report: Path, width: int) -> None:
    with Shown(chromium, report, width) as shown:
        shown.page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= width
        wide = shown.page.evaluate(
            """() => [...document.querySelectorAll('body *')]
                .filter(e => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1)
                .map(e => e.outerHTML.slice(0, 80))"""
        )
        assert wide == []


def test_plots_can_be_read_on_a_telephone(chromium: Any, report: Path) -> None:
    with Shown(chromium, report, 360) as shown:
        heights = shown.page.eval_on_selector_all(
            ".pictures svg text",
            "all => all.map(e => parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().d)",
        )
        assert len(heights) > 50
        assert min(heights) > 6.5  # px


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_plots_stand_out_in_both_schemes(chromium: Any, report: Path, scheme: str) -> None:
    with Shown(chromium, report, color_scheme=scheme) as shown:
        paper = brightness(shown.style("body", "background-color"))
        assert paper > 0.9 if scheme == "light" else paper < 0.2
        for selector in ("h1", "td", ".note, figcaption", "a"):
            assert abs(brightness(shown.style(selector, "color")) - paper) > 0.35, selector
        colors = shown.page.eval_on_selector_all(".pictures svg text", "all => all.map(e => getComputedStyle(e).fill)")
        assert min(abs(brightness(color) - paper) for color in colors) > 0.25


def test_print_is_light_and_shows_what_is_folded(chromium: Any, report: Path) -> None:
    with Shown(chromium, report, color_scheme="dark") as shown:
        shown.page.emulate_media(media="print")
        assert brightness(shown.style("body", "color")) < 0.2
        assert shown.style("nav", "display") == "none"
        assert shown.page.locator("details table").first.is_visible()
        assert len(shown.page.pdf()) > 10_000


def test_names_in_cells_and_plots_are_not_cut(chromium: Any, report: Path) -> None:
    with Shown(chromium, report) as shown:
        cut = shown.page.evaluate(
            """() => [...document.querySelectorAll('.pictures svg')].flatMap(svg => {
                const box = svg.getBoundingClientRect();
                return [...svg.querySelectorAll('text')].filter(e => {
                    const b = e.getBoundingClientRect();
                    return b.left < box.left - 2 || b.right > box.right + 2 || b.top < box.top - 2 || b.bottom > box.bottom + 2;
                }).map(e => e.textContent);
            })"""
        )
        assert cut == []
