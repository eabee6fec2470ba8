from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

EXAMPLE = ROOT / "examples" / "existing_trainer.py"


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_its_module_knows_nothing_of_us() -> None:
    tree = ast.parse(EXAMPLE.read_text())
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "lightning_cap"
        for alias in node.names
    }
    assert ours == {"CAPPruningCallback", "CAP", "SparsitySteps"}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert [ast.unparse(base) for cls in classes for base in cls.bases] == ["pl.LightningModule"]
    used = {node.id for cls in classes for node in ast.walk(cls) if isinstance(node, ast.Name)}
    assert not used & (ours | {"lightning_cap"})
    assert "calibration_step" not in EXAMPLE.read_text()


@pytest.mark.slow  # .ci/run does it from the shell
def test_the_example_runs(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLE), "6"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    result = re.search(r"([\d.]+)% right with 90\.0% of the weights at zero", run.stdout)
    assert result is not None, run.stdout
    assert float(result.group(1)) > 50  # ten classes; chance is 10
    saved = {path.name for path in tmp_path.rglob("sparsity=*")}
    assert {f"sparsity={s}.{kind}" for s in ("0.50", "0.75", "0.90") for kind in ("ckpt", "safetensors")} <= saved


TASKS = {  # example -> epochs, what it prints, and the least that it must reach; chance in the comment
    "tabular.py": (6, r"R² ([\d.]+) with 95\.0%", 0.8),  # 0
    "segmentation.py": (8, r"mean IoU ([\d.]+) with 75\.0%", 0.4),  # 0.28 where all is background
    "detection.py": (12, r"([\d.]+)% found with 75\.0%", 20.0),  # next to 0
    "text.py": (3, r"([\d.]+)% right with 75\.0%", 80.0),  # 50
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_other_tasks_run(name: str, tmp_path: Path) -> None:
    if name == "text.py":
        pytest.importorskip("transformers")
    epochs, pattern, least = TASKS[name]
    script = [sys.executable, str(EXAMPLE.parent / name), str(epochs)]
    run = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr
    result = re.search(pattern, run.stdout)
    assert result is not None, run.stdout
    assert float(result.group(1)) > least
    assert re.search(r"\n│ +75 % │ +[\d.]+ │|\n│ +95 % │ +[\d.]+ │", run.stdout), "the table has the metric"
