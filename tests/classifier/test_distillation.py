"""`DistillationLoss`, by itself and in `VisionClassifier`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cap import DistillationLoss, VisionClassifier
from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.errors import ConfigError
from lightning_cap.sparsity.targets import Targets
from tests.support.processes import as_by_torchrun
from tests.support.toy import callback, cap, trainer

VIT: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}


def vit(seed: int = 0, **other: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, **other}).eval()


def batch(size: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(size, 3, 16, 16, generator=generator), torch.arange(size) % 4


def wanted(kind: str, model: nn.Module, teacher: nn.Module, T: float) -> torch.Tensor:
    """The distance, from its definition, in float64."""
    images, _ = batch()
    model, teacher = copy.deepcopy(model).double(), copy.deepcopy(teacher).double()
    own, other = model(images.double()), teacher(images.double())
    if kind == "soft":
        p, q = (other / T).softmax(-1), (own / T).softmax(-1)
        return T**2 * (p * (p.log() - q.log())).sum(-1).mean()
    if kind == "hard":
        return -own.log_softmax(-1).gather(1, other.argmax(-1, keepdim=True)).mean()
    tokens, others = (
        m.norm(m.forward_features(images.double())) for m in (model, teacher)
    )  # of a ViT without its last norm
    return (tokens - others).square().mean()


@pytest.mark.parametrize(("kind", "T"), [("soft", 1.0), ("soft", 3.0), ("hard", 1.0)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_its_definition(kind: Any, T: float, alpha: float) -> None:
    model, teacher = vit(0), vit(1)
    images, labels = batch()
    found = DistillationLoss(teacher, alpha, T, kind)(model, images, lambda logits: F.cross_entropy(logits, labels))
    plain = F.cross_entropy(model(images), labels)
    torch.testing.assert_close(
        found.double(), (1 - alpha) * plain.double() + alpha * wanted(kind, model, teacher, T), rtol=1e-4, atol=1e-6
    )


def test_tokens_are_those_of_the_layer_in_both() -> None:
    model, teacher = vit(0), vit(1)
    images, _ = batch()
    found = DistillationLoss(teacher, 1.0, kind="token")(model, images, lambda logits: logits.sum())
    tokens, others = (m.forward_features(images) for m in (model, teacher))  # what the last norm gives
    torch.testing.assert_close(found, F.mse_loss(tokens, others))
    assert not model.norm._forward_hooks
    assert not teacher.norm._forward_hooks


def test_the_teacher_is_frozen_and_apart() -> None:
    module = VisionClassifier(vit(0), distillation=DistillationLoss(vit(1).train(), 0.5))
    teacher = module.distillation.teacher
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    own = {id(p) for p in module.parameters()}
    assert not own & {id(p) for p in teacher.parameters()}
    assert not any("teacher" in name for name in module.state_dict())
    module.train()
    module.calibration_step(batch(), 0).backward()
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("kind", ["soft", "hard", "token"])
def test_the_fisher_is_of_this_loss(kind: Any) -> None:
    """Per-sample gradient rows, by vmap, are those of autograd."""
    module = VisionClassifier(vit(0), distillation=DistillationLoss(vit(1), 0.7, 2.0, kind)).eval()
    targets = Targets.from_model(module)
    images, labels = batch(3)
    loss = lambda model, given: model.calibration_step(given, 0)  # noqa: E731
    (rows,) = GradientCollector(module, targets, loss, [(images, labels)], 3)
    for k in range(3):
        one = module.calibration_step((images[k : k + 1], labels[k : k + 1]), 0)
        grads = torch.autograd.grad(one, list(targets.values()))
        for (name, found), grad in zip(rows.items(), grads, strict=True):
            torch.testing.assert_close(found[k], grad, rtol=1e-3, atol=1e-5, msg=name)
    plain = VisionClassifier(module.model).calibration_step((images, labels), 0)
    assert module.calibration_step((images, labels), 0) != plain


def test_a_teacher_of_another_precision_takes_its_own_inputs() -> None:
    model, teacher = vit(0).double(), vit(1)
    images, labels = batch()
    loss = DistillationLoss(teacher)(model, images.double(), lambda logits: F.cross_entropy(logits, labels))
    assert torch.isfinite(loss)


def test_a_teacher_by_its_name(tmp_path: Path) -> None:
    torch.save(vit(1).state_dict(), tmp_path / "teacher.pt")
    loss = DistillationLoss("vit_tiny_patch16_224", checkpoint=str(tmp_path / "teacher.pt"), model_kwargs=VIT)
    images, _ = batch()
    assert torch.equal(loss.teacher(images), vit(1)(images))
    assert loss.num_classes == 4
    assert "VisionTransformer" in repr(loss)


def fit(folder: Path, devices: int = 1) -> Any:
    pl.seed_everything(1, verbose=False)
    loader = DataLoader(TensorDataset(*batch(32)), batch_size=8)
    module = VisionClassifier(vit(0), distillation=DistillationLoss(vit(1)))
    cb = callback({0: 0.5}, pruner=cap(num_gradients=8), dirpath=str(folder), include=None)
    options: Any = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    trainer(folder, cb, max_epochs=1, **options).fit(module, loader, loader)
    held = torch.load(folder / "sparsity=0.50.ckpt", weights_only=True)
    assert not any("teacher" in name for name in held["state_dict"])
    assert "distillation" not in held["hyper_parameters"]
    return cb.masks.global_sparsity


def test_a_run_learns_from_the_teacher(tmp_path: Path) -> None:
    assert fit(tmp_path) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.xdist_group("processes")
def test_several_processes_learn_from_teachers_of_their_own(tmp_path: Path) -> None:
    for sparsity in as_by_torchrun(2, tmp_path, fit, tmp_path, 2):
        assert sparsity == pytest.approx(0.5, abs=1e-3)


def test_what_does_not_go_together_is_told() -> None:
    model = vit(0)
    images, labels = batch()

    def told(loss: DistillationLoss) -> str:
        with pytest.raises(ConfigError) as caught:
            loss(model, images, lambda logits: F.cross_entropy(logits, labels))
        return str(caught.value)

    assert "gives shape (5, 7), and the model shape (5, 4)" in told(DistillationLoss(vit(1, num_classes=7)))
    assert "it is the model itself" in told(DistillationLoss(model))
    model.requires_grad_(True)
    assert "layer='head.fc': the teacher" in _refused(lambda: DistillationLoss(vit(1), kind="token", layer="head.fc"))
    assert "the model (VisionTransformer) has none" in told(DistillationLoss(_Named(), kind="token", layer="inner"))
    assert "7 classes, the model 4" in _refused(
        lambda: VisionClassifier(model, distillation=DistillationLoss(vit(1, num_classes=7)))
    )
    assert "are for the name of a timm model" in _refused(lambda: DistillationLoss(vit(1), pretrained=True))
    assert "keep one of them" in _refused(lambda: DistillationLoss("vit", pretrained=True, checkpoint="x"))


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Flatten()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        flat: torch.Tensor = self.inner(images)
        return flat


def _refused(call: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)
