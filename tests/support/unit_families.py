"""Small models of each family whose units are found, without pretrained weights, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn

from benchmarks.resnet20 import ResNet20

Family = tuple[Callable[[], nn.Module], tuple[int, ...]]


def _timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Sigmoid(), nn.Linear(7, 5))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )  # fmt: skip


#: Name -> (what makes a model, the shape of one example).
FAMILIES: dict[str, Family] = {
    "mlp": (_mlp, (6,)),
    "convolutions": (_convolutions, (3, 10, 10)),
    "vit": (_timm("vit_tiny_patch16_224", depth=2, img_size=32, embed_dim=48, num_heads=3), (3, 32, 32)),
    "deit": (_timm("deit_tiny_distilled_patch16_224", depth=2, img_size=32, embed_dim=48, num_heads=3), (3, 32, 32)),
    "resnet": (_timm("resnet10t"), (3, 32, 32)),
    "resnet_d": (_timm("resnet26d"), (3, 32, 32)),
    "resnet20": (lambda: ResNet20(5), (3, 16, 16)),
}


def example(family: str, batch: int = 2) -> Tensor:
    """A batch ``(batch, ...)`` of noise."""
    return torch.randn(batch, *FAMILIES[family][1], generator=torch.Generator().manual_seed(1))


def make(family: str) -> nn.Module:
    """The model in evaluation mode, its parameters disturbed, so that scales of zero hide nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family][0]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model
