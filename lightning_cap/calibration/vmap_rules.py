"""Lets `torch.func.vmap` batch what it has no rule for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def vmap_friendly() -> Iterator[None]:
    """Plain attention instead of fused kernels, which vmap would loop over, and batch norm that it takes in mixed precision."""
    with sdpa_kernel(SDPBackend.MATH), _PlainBatchNorm():
        yield


class _PlainBatchNorm(TorchFunctionMode):
    """Batch norm in eval mode as a scale and a shift, computed in float32 as autocast does.

    vmap's own rule fails when the input is bfloat16 and the statistics are float32.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None or input.dtype == running_mean.dtype:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale
    shift = shift if bias is None else shift + bias
    shape = (1, -1) + (1,) * (input.dim() - 2)
    return (input.float() * scale.view(shape) + shift.view(shape)).to(input.dtype)
