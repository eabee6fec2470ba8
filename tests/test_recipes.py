"""The recipes for ImageNet: what each prunes, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_cap.classifier import VisionClassifier
from lightning_cap.cli import main
from lightning_cap.sparsity import Targets
from tests.support import ROOT
from tests.support.configs import whole

VIT = ("blocks.0.attn.qkv.weight", "blocks.11.attn.proj.weight", "blocks.5.mlp.fc1.weight", "blocks.11.mlp.fc2.weight")
CONVNEXT = ("stages.1.downsample.1.weight", "stages.0.blocks.0.mlp.fc1.weight", "stages.3.blocks.0.mlp.fc2.weight")
DENSE_VIT = ("patch_embed.proj.weight", "head.weight")
DENSE_CONVNEXT = ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight", "head.fc.weight")
DEIT_TINY, DEIT_SMALL, DEIT_BASE = (
    (name, 48, number, VIT, DENSE_VIT)
    for name, number in (
        ("deit_tiny_patch16_224", 5_308_416),
        ("deit_small_patch16_224", 21_233_664),
        ("deit_base_patch16_224", 84_934_656),
    )
)
CONVNEXT_V2 = {
    "atto": (27, 3_264_000),
    "femto": (27, 4_700_160),
    "pico": (27, 8_355_840),
    "nano": (31, 14_694_400),
    "tiny": (39, 27_426_816),
    "base": (75, 86_507_520),
    "large": (75, 194_641_920),
}

#: Recipe -> model, targets, their weights, some of their names, some that are dense. Those of the fine-tuning are the checkpoint's.
RECIPES: dict[str, tuple[str, int, int, tuple[str, ...], tuple[str, ...]]] = {
    "deit_tiny_gradual": DEIT_TINY,
    "deit_small_gradual": DEIT_SMALL,
    "deit_base_gradual": DEIT_BASE,
    "deit_tiny_finetuning": DEIT_TINY,
    "deit_small_finetuning": DEIT_SMALL,
    "deit_base_finetuning": DEIT_BASE,
    "deit_small_oneshot_finetuning": DEIT_SMALL,
    "deit_base_oneshot_finetuning": DEIT_BASE,
    "deit_small_nm_oneshot": DEIT_SMALL,
    "deit_small_nm_10_epochs": DEIT_SMALL,
    "deit_small_nm_50_epochs": DEIT_SMALL,
    "deit_small_acdc": DEIT_SMALL,
    "deit_small_rigl": DEIT_SMALL,
    "vit_tiny_oneshot": ("vit_tiny_patch16_224", 48, 5_308_416, VIT, DENSE_VIT),
    "vit_small_oneshot_finetuning": ("vit_small_patch16_224", 48, 21_233_664, VIT, DENSE_VIT),
    "convnext_small_oneshot_finetuning": ("convnext_small.fb_in1k", 75, 48_660_480, CONVNEXT, DENSE_CONVNEXT),
    "xcit_small_oneshot_finetuning": (
        "xcit_small_12_p16_224.fb_in1k",
        60,
        24_772_608,
        ("blocks.11.attn.qkv.weight", "cls_attn_blocks.1.attn.k.weight", "cls_attn_blocks.0.mlp.fc2.weight"),
        (
            "patch_embed.proj.2.0.weight",
            "pos_embed.token_projection.weight",
            "blocks.0.local_mp.conv1.weight",
            "head.weight",
        ),
    ),
    "swin_tiny_oneshot_finetuning": (
        "swin_tiny_patch4_window7_224",
        51,
        27_426_816,
        (
            "layers.0.blocks.0.attn.qkv.weight",
            "layers.3.downsample.reduction.weight",
            "layers.2.blocks.5.mlp.fc2.weight",
        ),
        ("patch_embed.proj.weight", "head.fc.weight"),
    ),
    "resnet50d_oneshot_finetuning": (
        "resnet50d.ra2_in1k",
        54,
        23_473_152,
        (
            "conv1.3.weight",
            "conv1.6.weight",
            "layer1.0.conv1.weight",
            "layer4.2.conv3.weight",
            "layer2.0.downsample.1.weight",
        ),
        ("conv1.0.weight", "fc.weight"),
    ),
    "efficientformer_l1_gradual": (
        "efficientformer_l1",
        36,
        11_329_152,
        ("stem.conv2.weight", "stages.1.downsample.conv.weight", "stages.3.blocks.4.token_mixer.qkv.weight"),
        ("stem.conv1.weight", "head.weight", "head_dist.weight"),
    ),
    "efficientnetv2_rw_t_gradual": (
        "efficientnetv2_rw_t",
        135,
        12_243_264,
        (
            "blocks.0.0.conv.weight",
            "blocks.3.1.se.conv_reduce.weight",
            "blocks.5.13.conv_pwl.weight",
            "conv_head.weight",
        ),
        ("conv_stem.weight", "blocks.3.0.conv_dw.weight", "classifier.weight"),
    ),
    "convnext_large_clip_oneshot": (
        "convnext_large_mlp.clip_laion2b_soup_ft_in12k_in1k_320",
        75,
        194_641_920,
        CONVNEXT,
        (*DENSE_CONVNEXT, "head.pre_logits.fc.weight"),
    ),
    **{
        f"convnextv2_{size}_oneshot": (f"convnextv2_{size}.fcmae_ft_in1k", *counts, CONVNEXT, DENSE_CONVNEXT)
        for size, counts in CONVNEXT_V2.items()
    },
}

#: Arguments of timm that make a small model of the same kind.
SHRUNK: dict[str, dict[str, Any]] = {
    "deit": {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2},
    "vit": {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2},
    "convnext": {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]},
    "xcit": {"embed_dim": 24, "depth": 1, "num_heads": 2},
    "swin": {"img_size": 32, "window_size": 2, "embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "resnet50d": {"layers": [1, 1, 1, 1], "base_width": 8},
    "efficientformer": {"depths": [1, 1, 1, 2], "embed_dims": [8, 12, 16, 24]},
    "efficientnetv2": {},
}

FAST = ["deit_tiny_gradual"]


def config(recipe: str) -> Path:
    return ROOT / "configs" / f"imagenet_{recipe}.yaml"


def callback_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Of the pruning callback; of no callback, empty."""
    listed = settings["trainer"].get("callbacks", [])
    return next((c["init_args"] for c in listed if c["class_path"].endswith("CAPPruningCallback")), {})


def test_every_recipe_is_listed() -> None:
    assert {path.stem.removeprefix("imagenet_") for path in (ROOT / "configs").glob("imagenet_*.yaml")} == set(RECIPES)


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in RECIPES]
)
def test_targets_are_the_papers(recipe: str) -> None:
    settings = whole(config(recipe))
    model, number, weights, names, dense = RECIPES[recipe]
    arguments = settings["model"]["init_args"]
    assert arguments["model"] == model
    with torch.device("meta"):
        built = VisionClassifier(model, model_kwargs=arguments.get("model_kwargs"))
    include = settings.get("include", callback_settings(settings).get("include"))
    assert (include is None) == (recipe.endswith("_finetuning") and "oneshot" not in recipe)
    targets = Targets.from_model(built, include=include)
    assert (len(targets), targets.numel) == (number, weights)
    assert {f"model.{name}" for name in names} <= set(targets)
    left = {f"model.{name}" for name in dense}
    assert not left & set(targets)
    assert left <= {name for name, _ in built.named_parameters()}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four training images and two validation images each, 48 pixels."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, number in (("train", 4), ("val", 2)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 256, (48, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def shrunk(recipe: str, settings: dict[str, Any], images: Path) -> list[str]:
    """Arguments for two steps and one event on the images."""
    model = settings["model"]["init_args"]["model"]
    kwargs = dict(next(value for name, value in SHRUNK.items() if model.startswith(name)))
    if "convnext_large_mlp" in model:
        kwargs["head_hidden_size"] = 16
    size = 224 if "efficientformer" in model else 32  # of which alone that one takes images
    given = [
        f"--data.root={images}", f"--data.img_size={size}", "--data.batch_size=2", "--data.num_workers=0",
        "--model.pretrained=false", "--model.num_classes=2", f"--model.model_kwargs={json.dumps(kwargs)}",
        "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    if "sparsities" in settings:
        option = "--pruners.CAP" if "pruners" in settings else "--pruner"
        return [*given, f"{option}.num_gradients=8", "--loss_samples=4"]
    given += ["--trainer.strategy=auto", "--trainer.limit_train_batches=2", "--trainer.enable_model_summary=false"]
    pruner = callback_settings(settings).get("pruner")
    if pruner is not None and "Magnitude" not in str(pruner):
        given.append("--trainer.callbacks.pruner.num_gradients=8")
    if "samples_per_gradient" in str(pruner):
        given.append("--trainer.callbacks.pruner.samples_per_gradient=4")
    schedule = str(callback_settings(settings).get("schedule"))
    if schedule.endswith("gradual_steps.yaml"):
        given += ["--trainer.callbacks.schedule.steps={0: 0.5}", "--trainer.callbacks.save_sparsities=null"]
    if "AlternatingSchedule" in schedule:
        names = ("sparse_epochs", "dense_epochs", "last_dense_epochs")
        given += ["--trainer.callbacks.schedule.start_epoch=0", "--trainer.callbacks.schedule.end_epoch=2"]
        given += [f"--trainer.callbacks.schedule.{name}=1" for name in names]
    return [*given, f"--trainer.max_epochs={3 if 'AlternatingSchedule' in schedule else 1}"]


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in RECIPES]
)
@pytest.mark.filterwarnings("ignore")
def test_two_steps_and_an_event(recipe: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a small model of the same kind, by the same file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-cap"])
    settings = whole(config(recipe))
    command = "oneshot" if "sparsities" in settings else "fit"
    main([command, f"--config={config(recipe)}", *shrunk(recipe, settings, images)])
    if command == "oneshot":
        results = tmp_path / settings["output_dir"] / "results.jsonl"
        goals = {json.loads(line)["goal"] for line in results.read_text().splitlines()}
        assert set(settings["sparsities"]) <= goals
        return
    [folder] = (tmp_path / "runs" / f"imagenet_{recipe}").iterdir()
    assert "lr-AdamW" in (folder / "metrics.csv").read_text().splitlines()[0]
    events = [json.loads(line) for path in folder.rglob("events.jsonl") for line in path.read_text().splitlines()]
    assert [event["epoch"] for event in events][:1] == ([0] if callback_settings(settings) else [])
