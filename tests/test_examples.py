from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from lightning_cap.export import ONNX
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


def _model(name: str) -> tuple[nn.Module, Callable[[int], Any]]:
    """The model of an example, of which half is zero, and what makes inputs for it."""
    made: dict[str, Any] = {"__name__": name}
    exec((EXAMPLE.parent / f"{name}.py").read_text().split("pl.seed_everything")[0], made)
    torch.manual_seed(0)
    if name == "text":
        model = made["TextClassifier"]().bert

        def inputs(number: int) -> Any:
            sentences = made["Sentences"](number, number)
            batch = default_collate([sentences[i] for i in range(number)])
            return {name: batch[name] for name in ("input_ids", "attention_mask")}
    else:
        model = made["Detection"]() if name == "detection" else made["Segmentation"]().net
        inputs = lambda number: made["draw"](number, number)[0]  # noqa: E731
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(torch.rand_like(parameter) < 0.5)
    return model.eval(), inputs


@pytest.mark.parametrize(
    ("name", "taken", "given"),
    [
        ("text", ["input_ids", "attention_mask"], ["logits"]),
        pytest.param("detection", ["input"], ["output_0", "output_1"], marks=pytest.mark.slow),
        pytest.param("segmentation", ["input"], ["out"], marks=pytest.mark.slow),
    ],
)
def test_models_of_other_tasks_in_onnxruntime(name: str, taken: list[str], given: list[str], tmp_path: Path) -> None:
    """With other numbers of samples than they were exported with."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("transformers" if name == "text" else "scipy")
    model, inputs = _model(name)
    record = ONNX().export(model, tmp_path / "m.onnx", inputs(4))
    assert record.zeros_equal == record.weights > 0
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    assert [[value.name for value in side] for side in (session.get_inputs(), session.get_outputs())] == [taken, given]
    for number in (1, 7):
        batch = inputs(number)
        feed = batch if isinstance(batch, dict) else {"input": batch}
        outputs = session.run(None, {key: value.numpy() for key, value in feed.items()})
        with torch.no_grad():
            expected = tree_leaves(model(**batch) if isinstance(batch, dict) else model(batch))
        assert len(outputs) == len(expected)
        for one, other in zip(outputs, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(one), other, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_other_tasks_run(name: str, tmp_path: Path) -> None:
    if name == "text.py":
        pytest.importorskip("transformers")
        pytest.importorskip("onnxruntime")
    epochs, pattern, least = TASKS[name]
    script = [sys.executable, str(EXAMPLE.parent / name), str(epochs)]
    run = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr
    result = re.search(pattern, run.stdout)
    assert result is not None, run.stdout
    assert float(result.group(1)) > least
    assert (name == "text.py") == (tmp_path / "text.onnx").is_file()
    assert re.search(r"\n│ +75 % │ +[\d.]+ │|\n│ +95 % │ +[\d.]+ │", run.stdout), "the table has the metric"
