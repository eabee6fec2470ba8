"""Small models of each family whose units are found, without pretrained weights, and inputs for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import timm
import timm.layers
import timm.models
import torch
from timm.models._efficientnet_builder import decode_arch_def
from torch import Tensor, nn

from benchmarks.resnet20 import ResNet20

Family = tuple[Callable[[], nn.Module], tuple[int, ...]]


def _timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


def _resnet(name: str, **options: object) -> Callable[[], nn.Module]:
    """Narrow, where this version of timm can make it so."""
    takes = inspect.signature(timm.models.ResNet).parameters
    return _timm(name, **options, **({"channels": (8, 12, 16, 20)} if "channels" in takes else {}))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Sigmoid(), nn.Linear(7, 5))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )  # fmt: skip


def _efficientnet_v2() -> nn.Module:
    """Its kinds of blocks, one or two of each."""
    blocks = [["cn_r1_k3_s1_e1_c8_skip"], ["er_r2_k3_s2_e4_c8"], ["ir_r2_k3_s2_e4_c12_se0.25"]]
    return timm.models.EfficientNet(
        decode_arch_def(blocks), num_classes=5, num_features=16, stem_size=8, act_layer=nn.SiLU
    )


class SwiGLU(nn.Module):
    """A gated MLP on tokens with a residual connection, whose gate is a half of one layer's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.mlp = timm.layers.GluMlp(8, 2 * 10, act_layer=nn.SiLU, gate_last=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.mlp(x)).mean(1))


class Separate(nn.Module):
    """Attention whose queries and keys are shorter than its values, each by a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v = nn.Linear(12, 4 * 3), nn.Linear(12, 4 * 3), nn.Linear(12, 4 * 5)
        self.proj = nn.Linear(4 * 5, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)


#: Name -> (what makes a model, the shape of one example).
FAMILIES: dict[str, Family] = {
    "mlp": (_mlp, (6,)),
    "convolutions": (_convolutions, (3, 10, 10)),
    "vit": (_timm("vit_tiny_patch16_224", depth=2, img_size=32, embed_dim=48, num_heads=3), (3, 32, 32)),
    "swiglu": (SwiGLU, (4, 6)),
    "separate": (Separate, (4, 12)),
    "deit": (_timm("deit_tiny_distilled_patch16_224", depth=2, img_size=32, embed_dim=48, num_heads=3), (3, 32, 32)),
    "swin": (
        _timm(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 2), embed_dim=16, num_heads=(2, 4)
        ),
        (3, 32, 32),
    ),
    "convnext": (_timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)), (3, 32, 32)),
    "convnext_v2": (_timm("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)), (3, 32, 32)),
    "xcit": (_timm("xcit_nano_12_p16_224", depth=1, img_size=32, embed_dim=32, num_heads=4), (3, 32, 32)),
    "efficientnet_v2": (_efficientnet_v2, (3, 32, 32)),
    "mobilenet_v3": (_timm("mobilenetv3_small_050"), (3, 32, 32)),
    "resnet": (_resnet("resnet10t"), (3, 32, 32)),
    "resnet_d": (_resnet("resnet26d", layers=(2, 1, 1, 1)), (3, 32, 32)),
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
