from __future__ import annotations

from pathlib import Path

import pytest

from lightning_cap.cli.files import check_files
from lightning_cap.errors import ConfigError
from tests.support import ROOT


def test_files_that_are_well_pass() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        check_files(["fit", "--config", str(path), f"-c={path}", f"--model={path}"])
    check_files(
        ["fit", "--config={a: 1}", "--config", "s3://bucket/a.yaml", "--flag", "--steps={1: .5, 2: .6}", "--x", "{"]
    )


def test_anchors_and_merges_pass(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 2}\nb: &b\n  <<: *a\n  x: 2\nc:\n  <<: [*a, *b]\n? [1, 2]\n: 3\n")
    check_files(["fit", "--config", str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", r"a.yaml': 'a' is given twice, in lines 1 and 3"),
        ("a:\n  - b: 1\n    'b': 2\n", "'b' is given twice, in lines 2 and 3"),
        ("a: {1: 1, 1.0: 2}\n", "1.0 is given twice"),
        ("a:\n  {1:0.5}\n", r"'1:0.5' in line 2 is one number. Write a space after the colon"),
    ],
)
@pytest.mark.parametrize("option", ["--config", "--model"])
def test_wrong_keys(tmp_path: Path, text: str, words: str, option: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        check_files(["fit", option, str(tmp_path / "a.yaml")])
