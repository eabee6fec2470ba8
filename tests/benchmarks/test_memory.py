from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")


def one(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "gradients": 4, "batch": 4, "share": 1, "threads": 1, "device": "cpu", **more}


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("name", ["CAP", "LayerwiseOBS", "Magnitude"])
def test_an_event_is_planned_and_measured(benchmarks: Any, name: str) -> None:
    memory = benchmarks("memory")
    found = memory.measure(**one(name=name))
    assert found["planned"] == found["limit"]
    assert found["measured"] == max(found["reading"], found["after"]) > 0
    assert found["ratio"] == pytest.approx(found["measured"] / found["planned"])
    assert (found["passes"], found["weights"]) == (1, 884_736)


@LINUX
@pytest.mark.slow
def test_what_cannot_fit_is_refused_and_told(benchmarks: Any) -> None:
    memory = benchmarks("memory")
    found = memory.measure(**one(name="CAP", share=100))
    assert "max_memory: the pruning event needs" in found["refused"]
    assert memory.table([found]).splitlines()[-1] == "| tiny | CAP | 1/100 | refused |  |  |  |  |"


def test_prints_a_table_and_writes_json(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = benchmarks("memory")

    def fake(case: dict[str, Any]) -> dict[str, Any]:
        facts = {"planned": 2**30, "measured": 2**29, "ratio": 0.5, "passes": case["share"], "rows": 3}
        return {"model": case["model"], "pruner": case["name"], "share": case["share"], **facts}

    monkeypatch.setattr(memory, "in_fresh_process", fake)
    output = tmp_path / "out" / "memory.json"
    command = ["--models", "tiny", "--pruners", "CAP", "Magnitude", "--shares", "1", "8", "--output", str(output)]
    returned = memory.main(command)
    written = json.loads(output.read_text())
    assert written == returned
    assert {"date", "cpu", "threads", "torch"} <= set(written["machine"])
    assert [(r["pruner"], r["share"]) for r in written["results"]] == [("CAP", 1), ("CAP", 8), ("Magnitude", 1)]
    table = capsys.readouterr().out.splitlines()
    assert table[3] == "| tiny | CAP | 1/8 | 1,024 | 512 | 0.50 | 8 | 3 |"
    assert table[4] == "| tiny | Magnitude | - | 1,024 | 512 | 0.50 | 1 | 3 |"


@pytest.mark.slow
@LINUX
def test_measured_memory_is_within_a_quarter_of_what_is_planned(tmp_path: Path) -> None:
    output = tmp_path / "memory.json"
    command = ["--models", "deit_tiny, 4 blocks", "--pruners", "CAP", "--shares", "1", "8", "--output", str(output)]
    subprocess.run([sys.executable, str(ROOT / "benchmarks/memory.py"), "--threads", "1", *command], check=True)
    results = json.loads(output.read_text())["results"]
    assert [r["share"] for r in results] == [1, 8]
    assert all(0.75 <= r["ratio"] <= 1.25 for r in results), results
