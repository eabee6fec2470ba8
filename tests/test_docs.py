"""The pages under docs/, and the README: what they say can be done can be done, and what they name is there."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from lightning_cap import errors
from lightning_cap.cli import command, lightning_cli, plan
from lightning_cap.cli.export import _with_class_paths
from tests.support import ROOT
from tests.support.markdown import Page

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
API = "".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.md")))

every_page = pytest.mark.parametrize(
    "page", [Page(p) for p in PAGES], ids=lambda page: str(page.path.relative_to(ROOT))
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory like a checkout, whose files can be imported."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def _write_files(page: Page, folder: Path) -> None:
    for block in page.blocks("python") + page.blocks("yaml"):
        if block.title:
            (folder / block.title).write_text(block.code, encoding="utf-8")


def _marks(path: Path) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if path.name == "deploy.md" else []  # prunes a ViT-Tiny


@pytest.mark.parametrize("page", [pytest.param(Page(p), id=str(p.relative_to(ROOT)), marks=_marks(p)) for p in PAGES])
def test_python_blocks_run(page: Page, folder: Path) -> None:
    _write_files(page, folder)
    if any(word in page.text for word in ("CAPUnits(", "Units.from_model(")):
        pytest.importorskip("torch_pruning")
    for block in page.blocks("python"):
        if not (block.reason or block.title):
            code = compile("\n" * block.line + block.code, str(page.path), "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, {"__name__": "docs"})


class _ParsedError(Exception):
    pass


class _ParseOnly(lightning_cli.CAPCLI):
    def before_instantiate_classes(self) -> None:
        raise _ParsedError


def _parse(arguments: list[str]) -> None:
    """Let the command line take the arguments, and do nothing."""
    name, *rest = arguments
    if name in ("export", "report"):
        parser, _ = command._Command.others()[name]
        parser.parse_args(_with_class_paths(rest) if name == "export" else rest)
        return
    if name == "plan":  # its own options among those of a run
        own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        plan._add_options(own)
        rest = own.parse_known_args(rest)[1]
        name = plan._command(rest)
    elif name == "finetune-sweep":  # a folder, then the options of a run
        name, rest = "fit", rest[1:]
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises((_ParsedError, SystemExit)) as ended:
        _ParseOnly(trainer_class=lightning_cli.CAPTrainer, args=[name, *rest], save_config_callback=None)
    assert not getattr(ended.value, "code", None), ended.value  # --print_config ends with 0


COMMANDS = {tuple(words): page for page in map(Page, PAGES) for words in page.commands("lightning-cap")}


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_are_understood(arguments: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_files(COMMANDS[arguments], folder)
    monkeypatch.setattr(lightning_cli, "check_checkpoint", lambda *args, **kwargs: None)  # runs/ is not there yet
    monkeypatch.setattr(sys, "argv", ["lightning-cap"])
    _parse(list(arguments))


@every_page
def test_links_lead_somewhere(page: Page) -> None:
    for name, heading in page.links():
        linked = (page.path.parent / name).resolve() if name else page.path
        assert linked.is_file(), name
        assert linked.is_relative_to(ROOT), name
        if heading:
            assert heading in Page(linked).headings(), f"{name}#{heading}"


@every_page
def test_names_of_the_api_are_on_its_pages(page: Page) -> None:
    named = set(re.findall(r"\]\[(lightning_cap[\w.]*)\]", page.text))
    assert {name for name in named if f"::: {name}\n" not in API} == set()


def test_configurations_that_are_named_exist_and_all_are_named() -> None:
    named = {name for path in PAGES for name in re.findall(r"\bconfigs/[\w/]+\.yaml", path.read_text(encoding="utf-8"))}
    assert {name for name in named if not (ROOT / name).is_file()} == set()
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert {path.name for path in (ROOT / "configs").glob("*.yaml") if path.name not in text} == set()


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:  # type: ignore[attr-defined]
                yield from pages(part)

    navigation = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert len(set(navigation)) == len(navigation)
    own = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert own <= set(navigation)
    assert {name for name in navigation if name not in own and not (ROOT / name).is_file()} == set()


ROOMS = "pruners healing sparsity schedules data calibration export comparison report planning sweep tokens"


@pytest.mark.parametrize("room", ["lightning_cap", *(f"lightning_cap.{room}" for room in ROOMS.split())])
def test_every_public_name_is_on_an_api_page(room: str) -> None:
    module = importlib.import_module(room)
    shown = set(re.findall(r"^::: lightning_cap\.([\w.]+)$", API, re.MULTILINE))
    last = {name.rpartition(".")[2] for name in shown}
    assert {name for name in module.__all__ if name != "__version__" and name not in last} == set()


def test_every_error_has_its_remedy() -> None:
    ours = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.CAPError)}
    page = Page(DOCS / "troubleshooting.md")
    parts = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page.text, re.MULTILINE | re.DOTALL))
    assert {name for name in ours if len(parts.get(name, "").strip()) < 80} == set()
    assert {name for name in ours if f"| [`{name}`](#{name.lower()}) |" not in page.text} == set()


def _script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawing_is_what_its_script_draws() -> None:
    assert (DOCS / "images" / "block.svg").read_text(encoding="utf-8") == _script(DOCS / "images" / "block.py").draw()


def test_formulas_are_drawn_and_nothing_is_loaded_from_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    hooks = _script(DOCS / "hooks.py")
    html = hooks.on_page_content('<p><span class="arithmatex">\\(w_p^2 &lt; 1\\)</span></p>')
    assert html.startswith("<p><math")
    assert "<msubsup><mi>w</mi><mi>p</mi><mn>2</mn></msubsup>" in html
    page = type("Page", (), {"file": type("File", (), {"src_uri": "a.md"})})
    with caplog.at_level("WARNING", logger="mkdocs"):
        hooks.on_post_page('<a href="https://arxiv.org">paper</a><script src="assets/a.js"></script>', page=page)
        assert caplog.messages == []
        hooks.on_post_page('<script src="https://cdn.example/a.js"></script>', page=page)
    assert "a.md" in caplog.messages[0]
