"""`VisionClassifier` under `ModelParallelStrategy`, and the blocks that a model is shared out by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, TensorDataset

from lightning_cap.classifier import VisionClassifier
from lightning_cap.classifier.sharding import repeated_blocks
from lightning_cap.utilities.sharded import is_sharded
from tests.support.processes import as_by_torchrun
from tests.support.toy import callback, cap, trainer

VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_tiny_patch16_224", 12),
        ("convnext_atto", 4 + 2 + 2 + 6 + 2),  # stages, and the blocks in them
        ("swin_tiny_patch4_window7_224", 4 + 2 + 2 + 6 + 2),
        ("resnet18", 8),
    ],
)
def test_blocks_are_what_a_model_repeats(name: str, count: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    blocks = repeated_blocks(model)
    assert len(blocks) == count
    order = {id(block): i for i, block in enumerate(blocks)}
    for block in blocks:
        inner = [order[id(part)] for part in block.modules() if part is not block and id(part) in order]
        assert all(i < order[id(block)] for i in inner)


def test_a_model_without_blocks_has_none() -> None:
    assert repeated_blocks(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))) == []


def fit(folder: Path) -> list[bool]:
    pl.seed_everything(1, verbose=False)
    images, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 4
    loader = DataLoader(TensorDataset(images, labels), batch_size=8)
    model = VisionClassifier("vit_tiny_patch16_224", num_classes=4, model_kwargs=VIT)
    cb = callback({0: 0.5}, pruner=cap(num_gradients=8), dirpath=str(folder), include=None)
    strategy: Any = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    t = trainer(folder, cb, devices=2, strategy=strategy, max_epochs=1)
    t.fit(model, loader, loader)
    assert isinstance(model.model.blocks[1], FSDPModule)
    return [is_sharded(parameter) for parameter in model.parameters()]


@pytest.mark.xdist_group("processes")
def test_the_classifier_is_shared_out_and_pruned(tmp_path: Path) -> None:
    for sharded in as_by_torchrun(2, tmp_path, fit, tmp_path):
        assert all(sharded)
    weights = load_file(tmp_path / "sparsity=0.50.safetensors")
    zeros = [float((w == 0).float().mean()) for n, w in weights.items() if n.startswith("blocks.") and w.dim() == 2]
    assert len(zeros) == 8
    assert sum(zeros) / 8 == pytest.approx(0.5, abs=0.2)
