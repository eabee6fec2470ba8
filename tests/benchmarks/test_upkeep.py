from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


@pytest.fixture
def upkeep(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    upkeep = benchmarks("upkeep")

    def stack(depth: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)))

    for name, depth in (("few", 4), ("many", 30)):
        monkeypatch.setitem(upkeep.CASES, name, upkeep.Case(partial(stack, depth), (8,), 2, 2))
    return upkeep


def test_models_are_those_of_the_readme_and_of_deit_small(upkeep: Any) -> None:
    found = {name: upkeep.Training(upkeep.CASES[name], torch.device("cpu"), 0.5) for name in list(upkeep.CASES)[:2]}
    assert [len(t.targets) for t in found.values()] == [16, 48]
    assert [t.targets.numel for t in found.values()] == [196_608, 21_233_664]
    assert all(t.masks.global_sparsity == pytest.approx(0.5, abs=0.01) for t in found.values())


def test_prints_a_table_and_writes_json(upkeep: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "upkeep.json"
    command = ["--cases", "few", "many", "--repeats", "2", "--device", "cpu", "--output", str(output)]
    returned = upkeep.main(command)
    written = json.loads(output.read_text())
    assert written == returned
    assert {"date", "cpu", "cores", "threads", "torch", "lightning_cap"} <= set(written["machine"])
    assert written["device"] == "cpu"
    assert [r["targets"] for r in written["results"]] == [2, 28]
    for result in written["results"]:
        seconds = result["seconds"]
        assert min(seconds.values()) > 0
        assert result["upkeep_percent"] == pytest.approx(100 * seconds["upkeep"] / seconds["without"])
        assert result["operators"] == {"aten._foreach_mul_.List": 2}, "one for gradients, one for weights"
        assert result["operators_unmasked"] == {}
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| median of the steps | few | many |"
    assert all(line.count("|") == 4 for line in table[:14])
    assert any(line.startswith("| **upkeep, % of the step** | **") for line in table)


def test_both_ways_mask_alike(upkeep: Any) -> None:
    one, other = (upkeep.Training(upkeep.CASES["few"], torch.device("cpu"), 0.5) for _ in range(2))
    for training in (one, other):
        training.backward()
    one.upkeep()
    with torch.no_grad():
        other.by_bool()
    for name, weight in one.targets.items():
        assert weight is not other.targets[name]
        assert torch.equal(weight, other.targets[name])
        assert torch.equal(weight.grad, other.targets[name].grad)
        assert torch.equal(weight != 0, one.masks[name])
