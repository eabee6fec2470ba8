from __future__ import annotations

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_cap.sparsity.patterns import NofM, Pattern
from tests.support import ROOT

README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def _ci_commands() -> dict[str, str]:
    return dict(re.findall(r"^(INSTALL|TRAIN|TEST)='(.*)'$", CI, re.MULTILINE))


def test_the_two_commands_are_those_that_ci_runs() -> None:
    ci = _ci_commands()
    assert [block.strip() for block in _blocks("bash")[:2]] == [
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


@pytest.mark.parametrize("code", _blocks("python"), ids=lambda code: code.splitlines()[0])
def test_python_blocks_compile_and_their_imports_resolve(code: str) -> None:
    tree = ast.parse(code)
    compile(tree, "README.md", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_callback_takes_at_most_15_lines() -> None:
    block = next(block for block in _blocks("python") if "CAPPruningCallback" in block)
    assert len(block.splitlines()) <= 15


def test_the_one_shot_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    block = next(block for block in _blocks("python") if "sparsity=0.75" in block)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.splitlines()[-1].startswith("0.75 ")


def test_the_block_of_smaller_models_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_pruning")
    monkeypatch.chdir(tmp_path)
    block = next(block for block in _blocks("python") if "save_shrunk(" in block)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    small, again, batches = (names[name] for name in ("small", "again", "batches"))
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in small.parameters()) < 5.5e6
    with torch.inference_mode():
        assert torch.equal(again.eval()(batches[0][0]), small.eval()(batches[0][0]))


def test_the_pattern_block_is_2_of_4() -> None:
    parser = ArgumentParser()
    parser.add_argument("--pattern", type=Pattern)
    block = next(block for block in _blocks("yaml") if "NofM" in block)
    pattern = parser.instantiate_classes(parser.parse_object(yaml.safe_load(block))).pattern
    assert pattern == NofM(2, 4)


def test_named_files_exist() -> None:
    links = dict(link.partition("#")[::2] for link in re.findall(r"\]\((?!http)([^)]+)\)", README))
    names = set(re.findall(r"\bconfigs/\w+\.yaml", README)) | set(links)
    names |= {f"configs/{name}" for name in re.findall(r"`(\w+\.yaml)`", README)}
    assert {name for name in names if not (ROOT / name).is_file()} == set()
    assert {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= names


def test_linked_headings_exist() -> None:
    for name, heading in re.findall(r"\]\((?!http)([^)#]+)#([^)]+)\)", README):
        headings = re.findall(r"^#+ (.+)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings}, name
