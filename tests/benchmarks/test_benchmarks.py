from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from lightning_cap.cli import main as lightning_cap
from lightning_cap.sparsity.targets import Targets
from tests.references.obs import obs_block
from tests.support import ROOT

PER_CLASS = 3
SPARSITIES = [0.5, 0.9]


def write_tar(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for k in range(10):
            for i in range(PER_CLASS):
                stream = io.BytesIO()
                Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, format="JPEG")
                entry = tarfile.TarInfo(f"class{k}/{i}.jpg")
                entry.size = stream.tell()
                stream.seek(0)
                archive.addfile(entry, stream)


@pytest.fixture
def oneshot(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cifar10_oneshot

    small = cifar10_oneshot.Case(
        lambda: VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=10), 16
    )
    monkeypatch.setitem(cifar10_oneshot.CASES, "small", small)
    return cifar10_oneshot


@pytest.fixture
def data(tmp_path: Path, oneshot: Any) -> Path:
    write_tar(tmp_path / "data/cifar10/train.tar", 0)
    write_tar(tmp_path / "data/cifar10/val.tar", 1)
    (tmp_path / "data/weights").mkdir()
    torch.manual_seed(0)
    for name in ("resnet20", "small"):
        state = oneshot.CASES[name].make().state_dict()
        save_file(state, tmp_path / f"data/weights/{name}_cifar10.safetensors")
    return tmp_path / "data"


def test_resnet20_is_the_published_one(oneshot: Any) -> None:
    model = oneshot.ResNet20().eval()
    targets = Targets.from_model(model)
    assert sum(p.numel() for p in model.parameters()) == 269_722  # 0.27 M, He et al. 2016, table 6
    assert (len(targets), targets.numel) == (18, 267_264)
    assert {"conv1.weight", "linear.weight"}.isdisjoint(targets)
    x = torch.randn(2, 16, 8, 8)
    block = model.layer2[0]
    torch.nn.init.zeros_(block.bn2.weight)  # leaves the shortcut: subsampled, 8 zero channels before and after
    shortcut = block(x)
    torch.testing.assert_close(shortcut[:, 8:24], x[:, :, ::2, ::2].relu())
    assert shortcut[:, :8].abs().sum() == shortcut[:, 24:].abs().sum() == 0


def test_vit_prunes_the_24_block_weights(oneshot: Any) -> None:
    targets = Targets.from_model(oneshot.CASES["vit"].make())
    assert (len(targets), targets.numel) == (24, 1_179_648)
    assert all(name.startswith("blocks.") for name in targets)


def test_every_method_is_tuned_and_measured(
    oneshot: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", str(data), "--model", "small", "--per-sample", "--seeds", "0", "1", "--num-gradients", "8",
               "--val-images", "20", "--sparsities", "0.5", "--methods", "all", "--tune", "0.5", "--tune-images", "1",
               "--output", str(tmp_path / "all.json")]  # fmt: skip
    results = oneshot.main(command)
    assert list(results["summary"]) == results["settings"]["methods"] == list(oneshot.METHODS)
    assert {name: set(grid) for name, grid in results["grid"].items()} == {
        name: {f"{damp:g}" for damp in method.damps} for name, method in oneshot.METHODS.items() if method.damps
    }
    assert all(results["damps"][name] in oneshot.METHODS[name].damps for name in results["grid"])
    seeds = {name: cells["0.5"]["seeds"] for name, cells in results["summary"].items()}
    assert {name for name, count in seeds.items() if count == 1} == {"magnitude", "magnitude, uniform"}
    assert "| WoodFisher (damp " in capsys.readouterr().out


def test_vit_is_trained_pruned_to_2_of_4_and_fine_tuned(
    oneshot: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import cifar10_vit

    small = lambda: VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=10)  # noqa: E731
    monkeypatch.setattr(cifar10_vit, "vit", small)
    folder = tmp_path / "runs"
    command = ["--data", str(data), "--from-scratch", "--dense-epochs", "1", "--epochs", "1", "--batch-size", "16",
               "--batches", "1", "--val-batches", "1", "--num-gradients", "1", "--folder", str(folder),
               "--output", str(tmp_path / "vit.json")]  # fmt: skip
    results = cifar10_vit.main(command)
    assert json.loads((tmp_path / "vit.json").read_text()) == results
    assert (folder / "weights/vit_cifar10.safetensors").is_file()
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == ["dense, trained as long", "magnitude 2:4", "WoodFisher 2:4", "CAP 2:4"]
    assert all(rows[f"{name} 2:4"]["sparsity"] == 0.5 for name in cifar10_vit.METHODS)
    assert all(0 <= row["fine_tuned"] <= 100 for row in rows.values())
    assert "| CAP 2:4 |" in capsys.readouterr().out


def test_statistics_are_estimated_anew(oneshot: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
    images = [3 * torch.randn(8, 3, 5, 5) + 1 for _ in range(3)]
    oneshot.recalibrate(model, images)
    assert not model[1].training
    out = torch.cat([model[0](x) for x in images]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, out.mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "extra", "samples", "targets", "weights"),
    [
        ("resnet20", ["--block-size", "8"], 64, 18, 267_264),
        ("small", ["--per-sample", "--pad", "mean"], 1, 4, 12 * 16 * 16),
    ],
)
def test_oneshot_writes_json_and_table(
    oneshot: Any, data: Path, model: str, extra: list[str], samples: int, targets: int, weights: int,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "out" / "result.json"
    command = ["--data", str(data), "--model", model, "--seeds", "0", "7", "--num-gradients", "2", "--val-images", "20",
               "--sparsities", *map(str, SPARSITIES), "--output", str(output), *extra]  # fmt: skip
    returned = oneshot.main(command)
    results = json.loads(output.read_text())
    assert results == returned
    assert results["settings"]["samples_per_gradient"] == samples
    assert results["settings"]["damp"] == 1e-8
    assert (results["targets"], results["weights"], results["val_images"]) == (targets, weights, 20)
    assert {"date", "cpu", "cores", "threads", "torch", "lightning_cap"} <= set(results["machine"])
    assert {"gradients", "evaluation", "validation images"} <= set(results["seconds"])
    assert min(results["seconds"].values()) >= 0

    seeds = {method: [r["seed"] for r in results["runs"] if r["method"] == method] for method in oneshot.PAPER}
    assert seeds == {"magnitude": [None] * 2, "CAP cumulative": [0, 0, 7, 7], "CAP marginal": [0, 0, 7, 7]}
    for run in results["runs"]:
        assert run["sparsity"] == pytest.approx(run["target"], abs=1 / weights)
        assert 0 <= run["accuracy"] <= 100
        assert run["predicted_loss"] > 0
    cumulative, marginal = (
        [r["predicted_loss"] for r in results["runs"] if r["method"] == f"CAP {ranking}"]
        for ranking in ("cumulative", "marginal")
    )
    assert all(m <= c * (1 + 1e-6) for m, c in zip(marginal, cumulative, strict=True))  # same gradients, least in all
    cell = results["summary"]["CAP marginal"]["0.9"]
    assert cell["seeds"] == 2
    assert cell["sd"] >= 0

    table = capsys.readouterr().out.splitlines()
    head = table.index("| top-1 in % at a sparsity of | 50 % | 90 % |")
    assert [line.split("|")[1].strip() for line in table[head + 2 : head + 5]] == list(oneshot.PAPER)
    assert all(line.count("|") == 4 for line in table[head : head + 5])


def test_same_seed_gives_the_same_rows(oneshot: Any, data: Path, tmp_path: Path) -> None:
    command = ["--data", str(data), "--model", "small", "--num-gradients", "2", "--val-images", "10", "--sparsities",
               "0.8", "--output", str(tmp_path / "r.json"), "--seeds"]  # fmt: skip
    first, second, other = (
        [r["predicted_loss"] for r in oneshot.main([*command, seed])["runs"]] for seed in ("3", "3", "4")
    )
    assert first == second
    assert first[1:] != other[1:]


def test_gradual_config_runs_as_written(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    lightning_cap([
        "fit", "--config", "examples/cifar10_gradual.yaml",
        "--data.root", str(data / "cifar10"),
        "--model.checkpoint", str(data / "weights/resnet20_cifar10.safetensors"),
        "--data.batch_size", "10", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1",
        "--trainer.callbacks.pruner.num_gradients", "2", "--trainer.callbacks.pruner.block_size", "8",
        "--trainer.logger.init_args.save_dir", str(tmp_path / "runs"), "--trainer.enable_progress_bar", "false",
        "--trainer.accelerator", "cpu",
    ])  # fmt: skip
    files = sorted((tmp_path / "runs").rglob("sparsity=*.safetensors"))
    assert [file.stem for file in files] == [f"sparsity={s}" for s in ("0.50", "0.70", "0.80", "0.90")]
    weights = load_file(files[-1])
    pruned = [w for name, w in weights.items() if name.endswith((".conv1.weight", ".conv2.weight"))]
    assert len(pruned) == 18
    zeros = sum(int((w == 0).sum()) for w in pruned)
    assert zeros == int(0.9 * 267_264 + 0.5)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of ``benchmarks/`` by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


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


@pytest.mark.parametrize(("kind", "use_float64"), [("well", 0), ("ill", 96)])
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


@pytest.mark.parametrize("steps", [12, 16])
def test_every_elimination_has_the_same_order(benchmarks: Any, steps: int) -> None:
    found = benchmarks("engine_elimination").run(16, 16, steps, seconds=0.01)
    assert all(way["same_order"] == 1 and way["blocks_s"] > 0 for way in found.values())
    assert len(found) == 5


def test_flops_of_an_elimination(benchmarks: Any) -> None:
    flops = benchmarks("engine_elimination").flops(192, 144)
    assert flops["needed"] < flops["full rows"] < flops["rank-1"] == 2 * 144 * 192**2
    assert flops["full rows"] == 192 * 144 * 143


def test_gpu_rows_run_on_a_cpu(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = benchmarks("engine_gpu")
    monkeypatch.setattr(gpu, "DEIT_SMALL_BLOCK", {"qkv": (24, 8), "fc1": (32, 8)})
    found = gpu.phases(32, 2, 16, "cpu", row_chunk=16)
    assert (found["weights"], found["blocks"]) == (896, 56)
    assert set(found["seconds"]) == {"accumulate", "factor", "eliminate"}
    event = gpu.event(gpu.ModelCase("test_resnet", 16, 2, 2), "cpu")
    assert event["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert 0 < event["share_gradients"] < 1
    assert event["passes"] == 1


def test_engine_prints_a_table_and_writes_json(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = benchmarks("engine")
    cases, elimination = benchmarks("engine_cases"), benchmarks("engine_elimination")
    scripts = {
        "engine_cases.py": lambda spec: cases.run(cases.Case(**spec)),
        "engine_elimination.py": lambda spec: elimination.run(**spec),
    }
    monkeypatch.setattr(engine, "child", lambda script, spec, threads: json.loads(json.dumps(scripts[script](spec))))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "out" / "engine.json"
    engine.main(["--quick", "--repeats", "2", "--threads", "1", "--output", str(output)])
    written = json.loads(output.read_text())
    assert {"machine", "limits", "event", "elimination", "growth", "gpu", "table"} <= set(written)
    assert len(written["event"]["well"]["ours"]["runs"]) == 2
    assert 0 < written["event"]["ill"]["ours"]["limits"]["solve"]["reached"] < 1
    text = capsys.readouterr().out
    assert text.count(engine.NOT_MEASURED) == 9
    rows = [line for line in text.splitlines() if line.startswith("| event, d = ")]
    assert [line.split("|")[5].strip() for line in rows] == [">= 20", ">= 8"]
    assert "| accumulate, float32 |" in text


@pytest.mark.slow
def test_engine_runs_its_children(tmp_path: Path) -> None:
    output = tmp_path / "engine.json"
    command = [sys.executable, "benchmarks/engine.py", "--quick", "--repeats", "1", "--rows", "event", "--threads", "1"]
    subprocess.run([*command, "--output", str(output)], cwd=ROOT, env=os.environ, check=True, timeout=300)
    assert json.loads(output.read_text())["event"]["well"]["published"]["peak_bytes"] > 0
