"""One page about runs and comparisons, with everything in it: no network, no scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_cap._version import __version__
from lightning_cap.errors import ConfigError
from lightning_cap.report.comparison_sections import comparison_chapter
from lightning_cap.report.files import FileLinks
from lightning_cap.report.overview import overview_sections
from lightning_cap.report.parts import Chapter, Section
from lightning_cap.report.run_folder import CHECKPOINTS, Comparison, Run, read_folder
from lightning_cap.report.run_sections import run_chapter
from lightning_cap.utilities.arguments import require_list, require_path, shown
from lightning_cap.utilities.files import atomic

PAGE = "report.html"

Folder = str | PathLike[str]


def write_report(folders: Folder | Sequence[Folder], output: Folder | None = None) -> Path:
    """Write a page about runs and comparisons: finished, running, or stopped.

    Args:
        folders: Of a run (the logger's, or its checkpoints) or a comparison; or several.
        output: The file. Default: ``report.html`` in the first folder.

    Returns:
        The file.

    Raises:
        ConfigError: An argument is something else, or the file cannot be written.
        DataError: A folder is missing or holds nothing of ours, or a file in it is something else than its name says.
    """
    places = _folders(folders)
    require_path("output", output, "report.html", optional=True)
    page = places[0] / PAGE if output is None else Path(output).expanduser()
    if page.is_dir():
        raise ConfigError(f"output={shown(str(page))}: this is a folder. Give a file, such as {str(page / PAGE)!r}.")
    found = [one for place in places for one in read_folder(place)]
    text = _render(found, page)
    try:
        with atomic(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"output={shown(str(page))}: it cannot be written ({reason}). Give a file in a folder where you may write."
        ) from error
    return page


def _folders(folders: object) -> list[Path]:
    """What was given, each once."""
    given = [folders] if isinstance(folders, (str, PathLike)) else folders
    require_list("folders", given, "['runs/digits_gradual/version_0']")
    assert isinstance(given, Sequence)
    if not given:
        raise ConfigError("folders=[]: give at least one, such as 'runs/digits_gradual/version_0'.")
    for one in given:
        require_path("folders", one, "runs/digits_gradual/version_0")
    places = [Path(one).expanduser() for one in given]
    twice = [place for place, times in Counter(place.resolve() for place in places).items() if times > 1]
    if twice:
        raise ConfigError(f"folders={shown([str(place) for place in places])}: one is given twice. Give each once.")
    return places


def _render(found: Sequence[Run | Comparison], page: Path) -> str:
    titles, links = _titles(found), FileLinks(page)
    chapters: list[Chapter] = []
    for place, (one, title) in enumerate(zip(found, titles, strict=True), 1):
        if isinstance(one, Run):
            chapters.append(run_chapter(one, title, f"c{place}-", links))
        else:
            chapters.append(comparison_chapter(one, title, f"c{place}-", links))
    overview: list[Section] = overview_sections(found, titles) if len(found) > 1 else []
    templates = Environment(
        loader=PackageLoader("lightning_cap.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    title = titles[0] if len(titles) == 1 else f"{len(titles)} runs side by side"
    lead = f"{', '.join(titles)}."
    template = templates.get_template("page.html.j2")
    return template.render(title=title, lead=lead, chapters=chapters, overview=overview, version=__version__)


def _titles(found: Sequence[Run | Comparison]) -> list[str]:
    """A name for each: of its folder, with as much of the path before it as makes it the only one."""
    folders = [_parts(one) for one in found]
    ends = ["".join(f" ({told})" for told in _told(one, found)) for one in found]
    depth = [2 if parts[-1].startswith("version_") else 1 for parts in folders]
    while True:
        titles = ["/".join(parts[-n:]) + end for parts, n, end in zip(folders, depth, ends, strict=True)]
        twice = {title for title, times in Counter(titles).items() if times > 1}
        longer = [
            min(n + 1, len(parts)) if title in twice else n
            for parts, n, title in zip(folders, depth, titles, strict=True)
        ]
        if longer == depth:
            return titles
        depth = longer


def _parts(one: Run | Comparison) -> tuple[str, ...]:
    place = one.folder.resolve()
    named = place.parent if isinstance(one, Run) and place.name == CHECKPOINTS else place
    return named.parts[1:] or named.parts


def _told(one: Run | Comparison, found: Sequence[Run | Comparison]) -> list[str]:
    """What tells a run from others in the same folder."""
    if not isinstance(one, Run):
        return ["comparison"] if any(other is not one and other.folder == one.folder for other in found) else []
    same = [other for other in found if isinstance(other, Run) and other.folder == one.folder]
    told = [one.suffix.removeprefix("-") or "v0"] if len({other.suffix for other in same}) > 1 else []
    counted = {other.counted for other in same if other.suffix == one.suffix}
    return [*told, one.counted] if len(counted) > 1 else told
