"""Norms over channels some of which are gone because they are zero: what is left is normalised as if they were still there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import LayerNorm, LayerNorm2d, RmsNorm
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_cap.errors import UnsupportedError


class PartialLayerNorm(nn.LayerNorm):
    """LayerNorm over ``total`` channels of which those that are not here are zero.

    Mean and variance are over all ``total``. It is made of a LayerNorm, in place, by `adopt`.

    Attributes:
        total: Number of channels with the zeros.
        channel_dim: -1 for ``(..., C)``, 1 for ``(N, C, H, W)``.
    """

    total: int
    channel_dim: int

    @classmethod
    def adopt(cls, norm: nn.LayerNorm, total: int, channel_dim: int) -> None:
        """Make a norm, whose parameters are cut already, one of this class."""
        norm.__class__ = cls
        assert isinstance(norm, cls)  # told to the type checker
        norm.total, norm.channel_dim = total, channel_dim

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of shape ``(..., C)`` or ``(N, C, H, W)``, normalised. The zeros are put back for torch's own kernel."""
        x = x.movedim(self.channel_dim, -1)
        gone = (0, self.total - x.shape[-1])
        weight, bias = (None if p is None else F.pad(p, gone) for p in (self.weight, self.bias))
        out = F.layer_norm(F.pad(x, gone), (self.total,), weight, bias, self.eps)
        return out[..., : x.shape[-1]].contiguous().movedim(-1, self.channel_dim)

    def extra_repr(self) -> str:
        """With the number of channels that are counted."""
        return f"{super().extra_repr()}, total={self.total}"


def fit_norm(norm: nn.Module, path: str, lines: Mapping[str, Tensor]) -> None:
    """Let a norm whose parameters were cut give what it gave when the channels that are gone were zero.

    Args:
        norm: Any module; what is no norm is left alone.
        path: Its name in the model.
        lines: ``{parameter or buffer: bool (channels before)}`` of those that were cut along dim 0, True = still there.

    Raises:
        UnsupportedError: It is a norm over channels that is not known.
    """
    keep = next(iter(lines.values()))
    left, before = int(keep.sum()), len(keep)
    if isinstance(norm, nn.modules.batchnorm._NormBase):
        norm.num_features = left
    elif isinstance(norm, nn.LayerNorm):
        _fit_layer_norm(norm, path, left, before)
    elif isinstance(norm, nn.GroupNorm):
        _fit_group_norm(norm, path, keep)
    elif isinstance(norm, (nn.RMSNorm, RmsNorm)):
        if norm.eps is None:
            norm.eps = torch.finfo(norm.weight.dtype).eps
        _rescale(norm, (left / before) ** 0.5, before / left)
        norm.normalized_shape = (left,)
    elif isinstance(norm, GlobalResponseNorm):
        _rescale(norm, left / before, before / left)


def _fit_layer_norm(norm: nn.LayerNorm, path: str, left: int, before: int) -> None:
    if len(norm.normalized_shape) != 1:
        raise UnsupportedError(
            f"{path}: a LayerNorm over several dims cannot be shrunk. Leave its channels as they are."
        )
    norm.normalized_shape = (left,)
    if isinstance(norm, PartialLayerNorm):
        return  # counts what it counted
    forward = type(norm).forward
    if forward in (nn.LayerNorm.forward, LayerNorm.forward):
        PartialLayerNorm.adopt(norm, before, channel_dim=-1)
    elif forward is LayerNorm2d.forward:
        PartialLayerNorm.adopt(norm, before, channel_dim=1)
    else:
        raise UnsupportedError(
            f"{path}: a {type(norm).__name__} cannot be shrunk, for how it counts channels is not known. Leave the units that "
            "reach it as they are."
        )


def _fit_group_norm(norm: nn.GroupNorm, path: str, keep: Tensor) -> None:
    of_group = keep.reshape(norm.num_groups, -1)
    if bool((of_group.any(1) != of_group.all(1)).any()):
        raise UnsupportedError(
            f"{path}: a GroupNorm of which a group loses some channels cannot be shrunk. Prune whole groups of channels, or none."
        )
    norm.num_groups, norm.num_channels = int(of_group.any(1).sum()), int(keep.sum())


@torch.no_grad()
def _rescale(norm: Any, weight: float, eps: float) -> None:
    """A mean over fewer channels is larger by a factor, which the weight and eps take back."""
    norm.weight.mul_(1 / weight)
    norm.eps = norm.eps * eps
