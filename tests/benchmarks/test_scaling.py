from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def scaling(benchmarks: Any) -> Any:
    return benchmarks("scaling")


@pytest.fixture
def paper(benchmarks: Any) -> Any:
    return benchmarks("paper_model")


def test_a_phase_inside_another_pauses_it(scaling: Any) -> None:
    meter = scaling.Meter(("outer", "inner"))
    inner = meter.wrap("inner", lambda: (meter.send(3), time.sleep(0.05)))
    started = time.perf_counter()
    with meter.phase("outer"):
        meter.send(1)
        inner()
        sum(range(200_000))
        meter.send(1)
    both = time.perf_counter() - started
    assert meter.wall["inner"] >= 0.05
    assert 0 < meter.wall["outer"] <= both - meter.wall["inner"]
    assert meter.cpu["inner"] < 0.04, "sleeping takes no processor"
    assert meter.cpu["outer"] > 0
    assert meter.sent == {"outer": 2, "inner": 3}
    meter.start()
    assert set(meter.wall.values()) == {0}


def test_time_of_a_source_is_that_of_giving_its_items(scaling: Any) -> None:
    meter = scaling.Meter(("use", "give"))

    def source() -> Any:
        for i in range(3):
            time.sleep(0.02)
            yield i

    started = time.perf_counter()
    with meter.phase("use"):
        assert list(meter.items("give", source())) == [0, 1, 2]
    both = time.perf_counter() - started
    assert meter.wall["give"] >= 0.06
    assert 0 < meter.wall["use"] <= both - meter.wall["give"]


_PEAK = """
import torch
from meter import Meter
meter = Meter(("large", "small"))
with meter.phase("large"):
    block = torch.ones(2**24)  # 64 MiB
    del block
with meter.phase("small"):
    torch.ones(2**20)
print(meter.peak["large"] / 2**20, meter.peak["small"] / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is read from /proc")
def test_peak_memory_is_that_of_the_phase(scaling: Any) -> None:
    """In a process of its own: memory that others have freed is not new."""
    environment = {**os.environ, "PYTHONPATH": str(Path(scaling.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", _PEAK], env=environment, capture_output=True, text=True, check=True)
    large, small = map(float, done.stdout.split())
    assert 63 <= large < 80
    assert small < 16


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("gradients", "batch"), [(40, 4), (41, 4), (7, 2)])
def test_amounts_are_those_of_counting(paper: Any, ranks: int, gradients: int, batch: int) -> None:
    d, B = 96, 4
    found = paper.amounts(paper.Problem(d, gradients, B, batch, 0.5, packed=True, device="cpu"), ranks)
    blocks = [len(part) for part in torch.arange(d // B).tensor_split(ranks)]
    sizes = [min(batch, gradients - first) for first in range(0, gradients, batch)]  # of the batches, dealt out in turn
    busiest = max(sum(sizes[rank::ranks]) for rank in range(ranks))
    assert busiest <= found["rows"] < busiest + batch, "whole batches, at most all gradients"
    assert found["fisher"] == 4 * max(blocks) * B * (B + 1) // 2
    assert found["accumulate"] == gradients * max(blocks) * B * (B + 1)
    assert found["exchange"] == pytest.approx(4 * found["rows"] * d * (ranks - 1) / ranks)
    assert found["solve"] == 2 * max(blocks) * B**3
    assert (found["collectives"] > 0) == (found["gather"] > 0) == (ranks > 1)


def test_what_a_rank_does_falls_as_the_number_of_ranks(paper: Any) -> None:
    problem = paper.Problem(paper.WEIGHTS["DeiT-Small"], 4096, 192, 4, 0.5, packed=False)
    one, many = paper.amounts(problem, 1), paper.amounts(problem, 64)
    assert one["fisher"] == 4 * 21_233_664 * 192
    for key in ("rows", "fisher", "accumulate", "traffic", "solve", "reconstruct"):
        assert one[key] == 64 * many[key]
    assert many["gather"] == pytest.approx(4 * 21_233_664 * (1 + 1 / 32) * 63 / 64)
    assert many["planned"] > one["planned"] / 64, "the rows in flight do not fall"


def test_a_rank_of_a_sharded_model_holds_its_part(paper: Any) -> None:
    d, units = 192 * 2**22, 40  # 0.8 billion weights
    whole, shared = (paper.Problem(d, 4096, 192, 2, 0.5, packed=True, units=u) for u in (0, units))
    alone, eighth, replicated = paper.amounts(shared, 1), paper.amounts(shared, 8), paper.amounts(whole, 8)
    assert 8 * eighth["model"] == alone["model"] == replicated["model"]
    assert eighth["fisher"] == replicated["fisher"]
    assert eighth["exchange"] == replicated["exchange"] == 4 * 512 * d * 7 / 8
    assert eighth["lent"] == 2 * eighth["exchange"]
    assert replicated["lent"] == 0 == eighth["gather"]
    assert eighth["planned"] < 1.15 * alone["planned"] / 8 + 4 * d / units < replicated["planned"]


def test_seconds_are_amounts_over_rates(paper: Any) -> None:
    problem = paper.Problem(2**20, 1024, 128, 4, 0.5, packed=False)
    need = paper.amounts(problem, 16)
    rates = paper.Rates(
        sample=0.5, accumulate=1e9, solve=1e8, memory=1e12, node=1e9, network=1e8, latency=1e-3, node_size=4
    )
    took = paper.seconds(problem, 16, rates)
    assert took["collect"] == 0.5 * 64
    assert took["accumulate"] == need["accumulate"] / 1e9
    assert took["solve"] == need["solve"] / 1e8
    assert took["exchange"] == pytest.approx(need["exchange"] * (3 / 15 / 1e9 + 12 / 15 / 1e8)), (
        "3 peers are near, 12 far"
    )
    slow = paper.seconds(problem, 16, paper.Rates(0.5, 1e15, 1e8, 1e6, 1e9, 1e8, 1e-3, 4))
    assert slow["accumulate"] == need["traffic"] / 1e6, "bound by memory"
    assert paper.seconds(problem, 1, rates)["exchange"] == paper.seconds(problem, 1, rates)["agree"] == 0


def test_gpu_tables_say_that_they_are_assumed(scaling: Any, paper: Any) -> None:
    options = scaling.parse(["--gpus", "2", "16", "--sample-seconds", "0.5", "1", "2", "--network", "7e9"])
    assumed, on_paper, (text, *tables) = paper.gpu_tables(options)
    assert "nothing in these tables is measured" in text
    assert all(part in text for part in ("500, 1000, 2000 ms", "7 GB/s to other nodes", "2 TB/s of memory"))
    assert assumed["network"] == 7e9
    assert list(on_paper) == ["DeiT-Small", "DeiT-Base", "ViT-giant", "ViT-giant, sharded (FSDP2)"]
    for table, rows in zip(tables, on_paper.values(), strict=True):
        assert [row["gpus"] for row in rows] == [2, 16]
        lines = table.splitlines()
        assert lines[0].endswith("a GPU of | 2 | 16 |")
        assert all(line.count("|") == 4 for line in lines)
        assert f"{sum(rows[1]['seconds'].values()):.2f}" in lines[-1]
    assert on_paper["DeiT-Base"][0]["seconds"]["collect"] == 2048  # half of 4096 images of a second


@pytest.mark.parametrize("ranks", [["2", "4"], ["1"]])
def test_ranks_without_a_comparison_are_refused(
    scaling: Any, ranks: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        scaling.parse(["--ranks", *ranks])
    assert "--ranks: give 1" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_run(scaling: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "scaling.json"
    returned = scaling.main(["--quick", "--ranks", "2", "1", "--output", str(output)])
    written = json.loads(output.read_text())
    assert written == json.loads(json.dumps(returned))
    assert {"date", "cpu", "cores", "threads", "torch", "lightning_cap"} <= set(written["machine"])
    one, two = written["runs"]
    assert [one["ranks"], two["ranks"]] == [1, 2]
    assert one["weights"] == two["weights"] == 12 * 16**2
    assert one["blocks"] == 2 * two["blocks"] == 192
    assert one["fisher"] == 2 * two["fisher"] == 192 * 4 * 16 * 17 // 2
    assert two["masks_that_differ"] == 0
    assert two["relative_difference"] < 1e-5
    for run in (one, two):
        for key in ("wall", "cpu"):
            assert min(run[key].values()) >= 0
            assert min(run[key][phase] for phase in ("collect", "accumulate", "solve", "rest")) > 0
        assert run["wall"]["all"] >= max(value for phase, value in run["wall"].items() if phase != "all")
    assert set(one["sent"].values()) == {0}
    assert one["wall"]["exchange"] == 0 < two["wall"]["exchange"]
    for run in written["sharded_runs"]:
        assert run["masks_that_differ"] == run["relative_difference"] == 0
        assert run["from_whole"]["relative_difference"] < 1e-4
        assert run["fisher"] == written["runs"][run["ranks"] - 1]["fisher"]
    (check,) = written["check"]
    for key in ("fisher", "exchange", "select", "gather"):  # the formulas are exact where everything divides
        said, found = check["bytes"][key]
        assert found > 0, key
        assert said == pytest.approx(found, rel=1e-3 if key == "select" else 0), key  # but for the counts of ties
    tables = [block.splitlines() for block in capsys.readouterr().out.split("\n\n") if block.startswith("|")]
    assert [len(table) for table in tables[:7]] == [12, 12, 12, 14, 12, 12, 13]
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    assert tables[0][0] == "| seconds, a rank | R = 1 | R = 2 | 2 : 1 |"
