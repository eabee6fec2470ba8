"""The README's two commands, and what a newcomer reads first. What holds for every page is in `test_docs.py`."""

from __future__ import annotations

import re
import subprocess

import pytest
from jsonargparse import ArgumentParser
from yaml import safe_load

from lightning_cap.sparsity.patterns import NofM, Pattern
from tests.support import ROOT
from tests.support.markdown import Page

README = Page(ROOT / "README.md")
CI = (ROOT / ".ci" / "run").read_text()


def _ci_commands() -> dict[str, str]:
    return dict(re.findall(r"^(INSTALL|TRAIN|TEST)='(.*)'$", CI, re.MULTILINE))


def test_the_two_commands_are_those_that_ci_runs() -> None:
    ci = _ci_commands()
    assert [block.code.strip() for block in README.blocks("bash")[:2]] == [
        f"{ci['INSTALL']} && {ci['TRAIN']}",
        f"{ci['INSTALL']} && {ci['TEST']}",
    ]
    stages = re.findall(r"^.*\bstage (\w+) (.*)$", CI, re.MULTILINE)
    commands = dict(stages)
    assert commands["install"].startswith('"$INSTALL')
    assert commands["train"].startswith('"$TRAIN ')
    assert commands["tests"] == '"$TEST"'
    assert ci["TRAIN"].startswith("lightning-cap fit")


def test_ci_is_valid_bash() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def test_ci_builds_the_pages_with_warnings_as_errors() -> None:
    assert re.search(r"^stage docs '.*mkdocs build --strict", CI, re.MULTILINE)


def test_the_callback_takes_at_most_15_lines() -> None:
    block = next(block for block in README.blocks("python") if "CAPPruningCallback" in block.code)
    assert len(block.code.splitlines()) <= 15


def test_a_newcomer_reads_it_in_five_minutes() -> None:
    assert len(README.text.splitlines()) <= 200


def test_the_one_shot_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    block = next(block for block in README.blocks("python") if "sparsity=0.75" in block.code)
    exec(compile(block.code, "README.md", "exec", dont_inherit=True), {"__name__": "readme"})
    assert capsys.readouterr().out.splitlines()[-1].startswith("0.75 ")


@pytest.mark.parametrize("page", ["settings", "troubleshooting"])
def test_the_pattern_block_is_2_of_4(page: str) -> None:
    parser = ArgumentParser()
    parser.add_argument("--pattern", type=Pattern)
    block = next(block for block in Page(ROOT / "docs" / f"{page}.md").blocks("yaml") if "NofM" in block.code)
    pattern = parser.instantiate_classes(parser.parse_object(safe_load(block.code))).pattern
    assert pattern == NofM(2, 4)
