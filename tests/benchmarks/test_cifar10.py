"""The scripts on CIFAR-10, on a few images of noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from lightning_cap.cli import main as lightning_cap
from lightning_cap.sparsity.targets import Targets
from tests.support import ROOT
from tests.support.images import small_images, write_tar

SPARSITIES = [0.5, 0.9]
DIGITS = [f"class{k}" for k in range(10)]


@pytest.fixture
def oneshot(benchmarks: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    script = benchmarks("cifar10_oneshot")
    small = script.Case(
        lambda: VisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=1, num_heads=2, num_classes=10), 16
    )
    monkeypatch.setitem(script.CASES, "small", small)
    return script


@pytest.fixture
def data(tmp_path: Path, oneshot: Any) -> Path:
    """Seven images of each class in each split, and weights that were never trained."""
    for seed, split in enumerate(("train", "val")):
        write_tar(tmp_path / f"data/cifar10/{split}.tar", small_images(DIGITS, each=7, side=32, seed=100 * seed))
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_vit_is_trained_pruned_to_2_of_4_and_fine_tuned(
    oneshot: Any, benchmarks: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    cifar10_vit = benchmarks("cifar10_vit")
    monkeypatch.setattr(cifar10_vit, "vit", oneshot.CASES["small"].make)
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
        assert run["predicted_loss"] is None if run["method"] == "magnitude" else run["predicted_loss"] > 0
    cumulative, marginal = (
        [r["predicted_loss"] for r in results["runs"] if r["method"] == f"CAP {ranking}"]
        for ranking in ("cumulative", "marginal")
    )
    assert all(m <= c * (1 + 1e-6) for m, c in zip(marginal, cumulative, strict=True))  # same gradients, least in all
    cell = results["summary"]["CAP marginal"]["0.9"]
    assert cell["seeds"] == 2
    assert cell["sd"] >= 0

    table = capsys.readouterr().out.splitlines()
    head = table.index("| top-1 in % at a sparsity of | 50 % | 90 % | blocks in float64 |")
    assert [line.split("|")[1].strip() for line in table[head + 2 : head + 5]] == list(oneshot.PAPER)
    assert all(line.count("|") == 5 for line in table[head : head + 5])


def test_same_seed_gives_the_same_rows(oneshot: Any, data: Path, tmp_path: Path) -> None:
    command = ["--data", str(data), "--model", "small", "--num-gradients", "2", "--val-images", "10", "--sparsities",
               "0.8", "--output", str(tmp_path / "r.json"), "--seeds"]  # fmt: skip
    first, second, other = (
        [r["predicted_loss"] for r in oneshot.main([*command, seed])["runs"]] for seed in ("3", "3", "4")
    )
    assert first == second
    assert first[1:] != other[1:]


@pytest.mark.slow
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
