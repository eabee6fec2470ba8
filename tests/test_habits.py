"""Files of the project that no program of ours reads: they parse, and say what the others say."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_cap import __version__
from tests.support import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = [ROOT / ".github/ISSUE_TEMPLATE" / name for name in ("bug.yml", "feature.yml")]
SCRIPTS = [ROOT / ".ci" / name for name in ("run", "oldest", "common.sh")]
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def listed(name: str) -> list[str]:
    """The strings of a list in pyproject.toml; tomllib is there only from Python 3.11 on."""
    found = re.search(rf"^{name} = \[(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)
    assert found is not None
    return re.findall(r'"([^"]*)"', re.sub(r"^ *#.*", "", found[1], flags=re.MULTILINE))


def commands() -> list[str]:
    jobs = [job for path in WORKFLOWS for job in loaded(path)["jobs"].values()]
    return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_the_workflows_call_the_two_scripts_and_nothing_else() -> None:
    assert sorted(commands()) == ["bash .ci/oldest", "bash .ci/run"]


def test_the_workflows_have_what_their_scripts_need() -> None:
    for path in WORKFLOWS:
        workflow = loaded(path)
        assert workflow["permissions"] == {"contents": "read"}
        for job in workflow["jobs"].values():
            uses = [step["uses"].split("@")[0] for step in job["steps"] if "uses" in step]
            assert uses == ["actions/checkout", "actions/setup-python"]
            assert job["timeout-minutes"] * 60 >= max(map(limit, SCRIPTS[:2]))


def limit(script: Path) -> int:
    return int(re.findall(r"^LIMIT=(\d+)", script.read_text(), re.MULTILINE)[0])


def test_the_pythons_of_the_workflow_are_those_that_are_promised() -> None:
    promised = [line.split(" :: ")[-1] for line in listed("classifiers") if re.search(r":: 3\.\d+$", line)]
    run = next(loaded(path)["jobs"]["run"] for path in WORKFLOWS if "run" in loaded(path)["jobs"])
    assert run["strategy"]["matrix"]["python"] == [promised[0], promised[-1]]
    assert f'requires-python = ">={promised[0]}"' in PYPROJECT


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert bool(script.stat().st_mode & 0o111) == (script.suffix == "")


def test_the_script_for_the_oldest_reads_the_oldest_of_every_dependency(tmp_path: Path) -> None:
    program = re.search(r"<<'PYTHON'\n(.*?)^PYTHON$", SCRIPTS[1].read_text(), re.MULTILINE | re.DOTALL)
    assert program is not None
    found = subprocess.run(
        [sys.executable, "-c", program[1]], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    structured = re.findall(r'^structured = \["(.*?)"\]', PYPROJECT, re.MULTILINE)
    dependencies = [*listed("dependencies"), *structured]
    assert len(dependencies) == len(found.splitlines()) == 15
    for dependency, line in zip(dependencies, found.splitlines(), strict=True):
        name, oldest = line.split("==")
        assert re.match(rf"{name}(\[signatures\])?>={re.escape(oldest)}(,|$)", dependency)
    assert "lightning==2.5\n" in found


def test_pre_commit_runs_the_tools_of_the_development_environment() -> None:
    (repository,) = loaded(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format", "mypy"]
    dev = " ".join(listed("dev") if re.search(r"^dev = \[\n", PYPROJECT, re.MULTILINE) else PYPROJECT.splitlines())
    for hook in repository["hooks"]:
        assert {"name", "entry", "language"} <= set(hook)
        assert re.search(rf'["\s]{hook["entry"].split()[0]}>=', dev)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_are_forms(path: Path) -> None:
    form = loaded(path)
    assert {"name", "description", "body"} <= set(form)
    kinds = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert all(field["type"] in kinds and field["attributes"] for field in form["body"])
    identifiers = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(identifiers) == len(set(identifiers)) > 0
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_the_pull_request_template_names_the_script() -> None:
    assert "bash .ci/run" in (ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text()
    assert isinstance(loaded(ROOT / ".github/ISSUE_TEMPLATE/config.yml")["blank_issues_enabled"], bool)


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = loaded(ROOT / "CITATION.cff")
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    bibtex = (ROOT / "README.md").read_text().replace("{", "").replace("}", "")
    assert paper["title"] in bibtex
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert " and ".join(names) in bibtex


def test_the_security_page_and_the_requirements_exclude_the_same_versions() -> None:
    (lightning,) = [dependency for dependency in listed("dependencies") if dependency.startswith("lightning>")]
    excluded = re.findall(r"!=([\d.]+)", lightning)
    assert excluded == ["2.6.2", "2.6.3"]
    page = (ROOT / "SECURITY.md").read_text()
    assert all(version in page for version in excluded)
    assert "weights_only=True" in page


def test_the_editors_indent_as_the_formatter_does() -> None:
    parser = configparser.ConfigParser()
    parser.read_string("[top]\n" + (ROOT / ".editorconfig").read_text())
    assert parser["*.py"]["max_line_length"] == re.findall(r"^line-length = (\d+)", PYPROJECT, re.MULTILINE)[0]


def test_the_source_distribution_has_all_that_is_tested() -> None:
    table = PYPROJECT.split("[tool.hatch.build.targets.sdist]")[1].split("\n[")[0]
    included = {name.lstrip("/") for name in re.findall(r'"([^"]+)"', table)}
    assert all((ROOT / name).exists() for name in included)
    tracked = {
        ".ci", ".editorconfig", ".github", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE",
        "README.md", "SECURITY.md", "benchmarks", "configs", "docs", "examples", "lightning_cap", "mkdocs.yml", "tests",
    }  # fmt: skip
    assert included == tracked
