"""Batch and instance norm as a scale and a shift, whose gradients are right for every batch, also under `torch.func.vmap`.

On the CPU torch 2.15 (and earlier) computes wrong gradients through them for a batch of one sample when what comes back has the
strides of transposed tokens, as after ``flatten(2).transpose(1, 2)``. vmap's own rule fails when the input is bfloat16 and the
statistics are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class PlainNormalization(TorchFunctionMode):
    """Makes batch norm and instance norm a scale and a shift, in float32 or wider. Running statistics do not change."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The function itself, or what stands for it."""
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    dims = (0, *range(2, input.dim()))
    if not training and running_mean is not None and running_var is not None:
        return _normalize(input, running_mean, running_var, weight, bias, eps)
    if input.numel() == input.shape[1]:  # nothing to take statistics of, which torch refuses
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum or 0.0, eps)
    return _normalize_itself(input, dims, weight, bias, eps)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats and running_mean is not None and running_var is not None:
        return _normalize(input, running_mean, running_var, weight, bias, eps)
    if input[0, 0].numel() == 1:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _normalize_itself(input, tuple(range(2, input.dim())), weight, bias, eps)


_PLAIN: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.instance_norm: _instance_norm,
}


def _normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """By a mean and a variance of each channel (dim 1)."""
    wide, shape = torch.promote_types(x.dtype, torch.float32), (-1,) + (1,) * (x.dim() - 2)
    scale = torch.rsqrt(var.to(wide) + eps)
    scale = scale if weight is None else scale * weight.to(wide)
    shift = -mean.to(wide) * scale
    shift = shift if bias is None else shift + bias.to(wide)
    return (x.to(wide) * scale.view(shape) + shift.view(shape)).to(x.dtype)


def _normalize_itself(
    x: Tensor, dims: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """By the mean and the variance of the input over ``dims``."""
    wide, shape = torch.promote_types(x.dtype, torch.float32), (-1,) + (1,) * (x.dim() - 2)
    centred = x.to(wide) - x.to(wide).mean(dims, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(wide).view(shape)
    return (y if bias is None else y + bias.to(wide).view(shape)).to(x.dtype)
