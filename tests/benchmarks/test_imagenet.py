"""The script on an ImageNet ViT-Tiny, with a tiny model and images of noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from lightning_cap.healing import DistillHeal
from tests.support.images import small_images, write_tar

CLASSES = [f"n{k:08d}" for k in range(3)]


def tiny(*_: Any, **__: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=224, patch_size=56, embed_dim=16, depth=1, num_heads=2, num_classes=3)


@pytest.fixture
def script(benchmarks: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for seed, split in enumerate(("train", "val")):
        write_tar(tmp_path / f"data/imagenet1k-sample/{split}.tar", small_images(CLASSES, each=4, side=240, seed=seed))
    (tmp_path / "data/weights").mkdir()
    save_file(tiny().state_dict(), tmp_path / "data/weights/vit_tiny_patch16_224.safetensors")
    script = benchmarks("imagenet_vit_tiny")
    monkeypatch.setattr(script.timm, "create_model", tiny)
    few = DistillHeal(num_inputs=8, steps=2, batch_size=4)
    for name, method in script.METHODS.items():
        monkeypatch.setitem(script.METHODS, name, replace(method, heals=dict.fromkeys(method.heals, few)))
    return script


def command(tmp_path: Path, *more: str) -> list[str]:
    return ["--data", str(tmp_path / "data"), "--seeds", "0", "1", "--num-gradients", "8", "--block-size", "16",
            "--sparsities", "0.5", "--output", str(tmp_path / "out.json"), *more]  # fmt: skip


def test_methods_get_the_same_gradients_and_are_healed(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ["magnitude", "layer-wise OBS", "CAP, damp 1e-4", "CAP, shrunk", "CAP, shrunk, 2:4"]
    results = script.main(command(tmp_path, "--methods", *methods))
    assert json.loads((tmp_path / "out.json").read_text()) == results
    assert (results["images"], results["weights"]) == (12, 12 * 16 * 16)
    runs = [(run["method"], run["heal"], run["seed"]) for run in results["runs"]]
    for seed in (0, 1):
        assert {run[:2] for run in runs if run[2] == seed} == {
            ("layer-wise OBS", ""), ("CAP, damp 1e-4", ""), ("CAP, shrunk", ""), ("CAP, shrunk", "distilled"),
            ("CAP, shrunk, 2:4", ""), ("CAP, shrunk, 2:4", "distilled"),
        }  # fmt: skip
    assert [run[2] for run in runs if run[0] == "magnitude"] == [None]
    assert all(run["zeros"] == pytest.approx(0.5, abs=1e-3) for run in results["runs"])
    healed = [run for run in results["runs"] if run["heal"]]
    assert all(run["heal_passes"] > 0 for run in healed)
    shown = capsys.readouterr().out
    assert "| CAP, shrunk + distilled |" in shown
    assert "| 2:4 |" in shown
    assert script.main(["--show", str(tmp_path / "out.json"), str(tmp_path / "out.json")]) == results
    assert capsys.readouterr().out.strip() in shown


@pytest.mark.slow
def test_tuning_sees_no_validation_image(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.ImageNetDataModule, "validation_set", lambda *_: pytest.fail("validation images"))
    results = script.main(command(tmp_path, "--held-out", "--permute", "--methods", "CAP, shrunk, 2:4"))
    assert results["images"] == 3  # every fifth of twelve
    assert results["settings"]["held_out"]
