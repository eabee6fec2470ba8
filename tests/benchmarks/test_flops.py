from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

TOKENS, DEPTH = 197, 12


@pytest.fixture
def flops(benchmarks: Any) -> Any:
    return benchmarks("flops")


@pytest.mark.parametrize(("name", "width"), [("deit_tiny", 192), ("deit_small", 384)])
def test_the_papers_reductions_are_explained_to_half_a_point(flops: Any, name: str, width: int) -> None:
    for sparsity, paper in zip(flops.SPARSITIES, flops.PAPER[name], strict=True):
        assert 100 * flops.saved_by_the_papers_count(width, sparsity) == pytest.approx(paper, abs=0.5)


def test_prints_a_table_and_writes_json(flops: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "flops.json"
    returned = flops.main(["--models", "deit_tiny", "--layers", "--output", str(output)])
    assert json.loads(output.read_text()) == returned
    (found,) = returned["results"]
    targets = 2 * DEPTH * 12 * 192**2 * TOKENS
    rest = 2 * (DEPTH * 2 * TOKENS**2 * 192 + 196 * 768 * 192 + 192 * 1000)
    assert (found["targets"], found["flops_of_targets"], found["flops"]) == (48, targets, targets + rest)
    assert found["rows"][0]["torch"] == pytest.approx(50 * targets / (targets + rest))
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].startswith("| deit_tiny, 2.51 GFLOPs, 83.4 % in targets | this package | 41.7 | 50.0 | 62.6 ")
    assert "| blocks.3.mlp.fc1.weight | 58.1 | 29.0 |" in printed
    assert printed[-1] == "| total | 2507.4 | 1461.6 |"
