from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from tests.references.obs import obs_block
from tests.support import ROOT


def test_the_yardstick_is_cap(benchmarks: Any) -> None:
    published = benchmarks("published")
    K, B, N, damp = 5, 12, 40, 1e-3
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(N, K, B, generator=generator)
    weights = torch.randn(K, B, generator=generator)
    inverse = published.accumulate(iter(rows), K, B, N, damp)
    fisher = rows.double().permute(1, 2, 0) @ rows.double().permute(1, 0, 2) / N
    torch.testing.assert_close(inverse.double(), torch.linalg.inv(fisher + damp * torch.eye(B)), rtol=1e-3, atol=1e-4)

    traces = published.eliminate(inverse.clone(), weights.clone(), chunk=2)
    assert traces.weights.shape == (B + 1, K, B)
    exact = [obs_block(fisher[k].numpy(), weights[k].numpy(), np.ones(B, bool), damp) for k in range(K)]
    for k, found in enumerate(exact):
        assert traces.scores[k].argsort().tolist() == found.order
        np.testing.assert_allclose(traces.scores[k][found.order], np.cumsum(found.losses), rtol=1e-3)
        np.testing.assert_allclose(traces.weights[:, k], np.stack(found.weights), atol=1e-3)
    assert torch.equal((traces.weights == 0).sum(-1), torch.arange(B + 1).unsqueeze(1).expand(-1, K))

    half, most = published.select(traces, [0.5, 0.9])
    assert int((half == 0).sum()) == K * B // 2
    assert int((most == 0).sum()) == round(0.9 * K * B)
    for in_place in (False, True):
        order, losses = published.rank1_elimination(inverse.clone(), weights.clone(), 9, in_place)
        assert order.tolist() == [found.order[:9] for found in exact]
        np.testing.assert_allclose(losses, [found.losses[:9] for found in exact], rtol=2e-3)


def test_limits_are_plausible(benchmarks: Any) -> None:
    limits = benchmarks("limits")
    torch.set_num_threads(1)
    found = limits.limits(0.01)
    assert set(found["gflops"]) == {"float32", "float64"}
    assert 1 < found["gflops"]["float64"]["1"] < found["gflops"]["float32"]["1"] < 1e4
    assert 0.5 < found["copy_gb_s"]["1"] < 1e4
    assert 0.5 < found["read_gb_s"]["1"] < 1e4


@pytest.mark.parametrize(("kind", "use_float64"), [("well", 0), pytest.param("ill", 0, marks=pytest.mark.slow)])
def test_both_engines_give_the_same_event(benchmarks: Any, kind: str, use_float64: int) -> None:
    cases = benchmarks("engine_cases")
    common = {"kind": kind, "weights": 96 * 64, "block_size": 64, "num_gradients": 200, "threads": 1}
    ours = cases.run(cases.Case("ours", **common))
    published = cases.run(cases.Case("published", **common))
    assert ours["blocks_float64"] == use_float64
    assert ours["blocks_damping_increased"] == 0
    assert ours["zeros"] == pytest.approx(cases.SPARSITIES, abs=1e-3)
    assert published["zeros"] == pytest.approx(cases.SPARSITIES, abs=1e-3)
    # ours ranks for the least loss; the published inverse of ill-conditioned blocks is a rough one
    assert all(a <= b * 1.01 for a, b in zip(ours["loss"], published["loss"], strict=True))
    assert set(ours["phases"]) == set(published["phases"]) == {"accumulate", "solve", "results"}
    assert ours["seconds"] == pytest.approx(sum(ours["phases"].values()))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the memory")
def test_peak_memory_is_what_was_held(benchmarks: Any) -> None:
    cases = benchmarks("engine_cases")
    held = cases.peak_bytes(lambda: torch.ones(2**24).sum())
    assert held == pytest.approx(2**26, rel=0.1)
    assert cases.peak_bytes(lambda: None) < 2**22


def test_the_same_rows_at_every_reading(benchmarks: Any) -> None:
    cases = benchmarks("engine_cases")
    rows = cases.Rows(cases.Case("ours", "ill", 96 * 64, 64, 20, 1))
    first, second = ([row.clone() for row in rows.one_by_one()] for _ in range(2))
    assert len(first) == 20
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[16])
    assert rows.seconds > 0


@pytest.mark.parametrize("steps", [12, pytest.param(16, marks=pytest.mark.slow)])
def test_every_elimination_has_the_same_order(benchmarks: Any, steps: int) -> None:
    found = benchmarks("engine_elimination").run(16, 16, steps, seconds=0.01)
    assert all(way["same_order"] == 1 and way["blocks_s"] > 0 for way in found.values())
    assert len(found) == 5


def test_flops_of_an_elimination(benchmarks: Any) -> None:
    flops = benchmarks("engine_elimination").flops(192, 144)
    assert flops["needed"] < flops["full rows"] < flops["rank-1"] == 2 * 144 * 192**2
    assert flops["full rows"] == 192 * 144 * 143


@pytest.mark.skipif(not timm.is_model("test_resnet"), reason="this timm has no test_resnet")
def test_gpu_rows_run_on_a_cpu(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = benchmarks("engine_gpu")
    monkeypatch.setattr(gpu, "DEIT_SMALL_BLOCK", {"qkv": (24, 8), "fc1": (32, 8)})
    found = gpu.phases(32, 2, 16, "cpu", row_chunk=16)
    assert (found["weights"], found["blocks"]) == (896, 56)
    assert set(found["seconds"]) == {"accumulate", "factor", "eliminate"}
    with pytest.warns(
        UserWarning, match="all 2 are zero for 9 of 14 targets"
    ):  # a new one multiplies its branches by 0
        event = gpu.event(gpu.ModelCase("test_resnet", 16, 2, 2), "cpu")
    assert event["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert 0 < event["share_gradients"] < 1
    assert event["passes"] == 1


def test_an_event_by_phase(benchmarks: Any) -> None:
    share = benchmarks("engine_share")
    options = {"depth": 1, "img_size": 32, "embed_dim": 24, "num_heads": 2}
    found = share.run(share.ShareCase("vit_tiny_patch16_224", 5, 24, 1e-2, 1, options))
    assert set(found["cpu_seconds"]) == {"gradients", "collect besides", "accumulate", "plan and solve", "results"}
    assert all(seconds >= 0 for seconds in found["cpu_seconds"].values())
    assert found["share"] == pytest.approx(found["cpu_seconds"]["gradients"] / found["total"])
    assert found["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert found["planned_bytes"] > 0


@pytest.mark.slow
def test_engine_prints_a_table_and_writes_json(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = benchmarks("engine")
    cases, elimination, share, kernels = (
        benchmarks(f"engine_{name}") for name in ("cases", "elimination", "share", "kernels")
    )
    fact = {"kernel": "registers", "block_size": 16, "dtype": "float32", "arch": 80, "threads": 32, "registers": 60}
    fact |= {"spilled_bytes": 0, "shared_bytes": 1024, "columns_bytes": None, "resident": 32}
    monkeypatch.setattr(kernels, "facts", lambda *given: fact)  # compiled in tests/kernels
    scripts = {
        "engine_cases.py": lambda spec: cases.run(cases.Case(**spec)),
        "engine_elimination.py": lambda spec: elimination.run(**spec),
        "engine_share.py": lambda spec: share.run(share.ShareCase(**spec)),
        "engine_kernels.py": lambda spec: {"kernels": kernels.run(**spec)},
    }
    monkeypatch.setattr(engine, "child", lambda script, spec, threads: json.loads(json.dumps(scripts[script](spec))))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "out" / "engine.json"
    engine.main(["--quick", "--repeats", "2", "--threads", "1", "--output", str(output)])
    written = json.loads(output.read_text())
    assert {"machine", "limits", "event", "elimination", "growth", "share", "kernels", "gpu", "table"} <= set(written)
    assert len(written["event"]["well"]["ours"]["runs"]) == 2
    assert 0 < written["event"]["ill"]["ours"]["limits"]["solve"]["reached"] < 1
    text = capsys.readouterr().out
    assert text.count(engine.NOT_MEASURED) == 9
    rows = [line for line in text.splitlines() if line.startswith("| event, d = ")]
    assert [line.split("|")[5].strip() for line in rows] == [">= 20", ">= 8"]
    assert "| accumulate, float32 |" in text
    assert "% in gradients | >= 80 % |" in text
    assert text.count("| registers | 16 | float32 | sm_80 (A100) | 32 | 60 | 0 | 1 KiB | - | 32 |") == 2
    assert engine.NO_GPU in text


def test_without_a_gpu_it_says_so(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = benchmarks("engine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(engine, "limits", lambda seconds: {"gflops": {}, "gpu": None})

    def fail(*given: Any) -> None:
        raise RuntimeError("engine_kernels.py failed: no triton")

    monkeypatch.setattr(engine, "child", fail)
    engine.main(["--rows", "kernels", "gpu", "--output", str(tmp_path / "engine.json")])
    text = capsys.readouterr().out
    assert engine.NO_GPU in text
    assert text.count(engine.NOT_MEASURED) == 9
    assert "The kernels for a GPU were not compiled: engine_kernels.py failed: no triton" in text


@pytest.mark.slow
def test_engine_runs_its_children(tmp_path: Path) -> None:
    output = tmp_path / "engine.json"
    command = [sys.executable, "benchmarks/engine.py", "--quick", "--repeats", "1", "--rows", "event", "--threads", "1"]
    subprocess.run([*command, "--output", str(output)], cwd=ROOT, env=os.environ, check=True, timeout=300)
    assert json.loads(output.read_text())["event"]["well"]["published"]["peak_bytes"] > 0
