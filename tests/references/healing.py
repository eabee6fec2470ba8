"""Healing as it is defined, in float64 NumPy: plain least squares for one row at a time, on unfolded inputs.

Slow on purpose and written without a look at the package: it decides what is right.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def unfolded(layer: torch.nn.Module, x: Tensor) -> list[np.ndarray]:
    """What each output row of a layer is multiplied with: ``O`` arrays ``(n, I)``, found by running one-hot weights."""
    weight = layer.weight
    inputs = weight[0].numel()
    rows = []
    probe = torch.eye(inputs, dtype=torch.float64).view(inputs, *weight.shape[1:])
    for row in range(len(weight)):
        if isinstance(layer, torch.nn.Linear):
            rows.append(x.double().reshape(-1, inputs).numpy())
            continue
        group = row // (len(weight) // layer.groups)
        channels = weight.shape[1]
        part = x.double()[:, group * channels : (group + 1) * channels]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        part = F.pad(part, layer._reversed_padding_repeated_twice, mode=mode)
        convolve = F.conv1d if x.dim() == 3 else F.conv2d
        out = convolve(part, probe, None, layer.stride, 0, layer.dilation)  # (n, I, ...)
        rows.append(out.movedim(1, -1).reshape(-1, inputs).numpy())
    return rows


def heal_row(
    x: np.ndarray, dense: np.ndarray, pruned: np.ndarray, kept: np.ndarray, scale: float, ridge: float
) -> np.ndarray:
    """``argmin |X (w - d)|² / n + ridge · scale · |w - p|²`` over ``w`` that is zero where nothing is kept, by `lstsq`."""
    n = len(x)
    support = np.flatnonzero(kept)
    damp = np.sqrt(n * ridge * scale)
    left = np.concatenate([x[:, support], damp * np.eye(len(support))])
    right = np.concatenate([x @ dense, damp * pruned[support]])
    out = np.zeros_like(dense)
    out[support] = np.linalg.lstsq(left, right, rcond=None)[0]
    return out


def heal_layer(
    layer: torch.nn.Module, x: Tensor, dense: Tensor, dense_bias: Tensor | None, mask: Tensor, ridge: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight ``(O, I)`` and bias of the healed layer, whose parameters are those of the pruned one."""

    def numbers(tensor: Tensor) -> np.ndarray:
        return tensor.detach().double().flatten(1).numpy() if tensor.dim() > 1 else tensor.detach().double().numpy()

    weights, biases = [], []
    for row, rows in enumerate(unfolded(layer, x)):
        scale = float((rows**2).mean())
        d, p, kept = numbers(dense)[row], numbers(layer.weight)[row], mask.flatten(1)[row].numpy()
        if layer.bias is not None:
            assert dense_bias is not None
            rows = np.concatenate([rows, np.ones((len(rows), 1))], 1)
            d, p = np.append(d, numbers(dense_bias)[row]), np.append(p, numbers(layer.bias)[row])
            kept = np.append(kept, True)
        healed = heal_row(rows, d, p, kept, scale, ridge)
        weights.append(healed[: mask[0].numel()])
        biases.append(healed[-1])
    return np.stack(weights), None if layer.bias is None else np.array(biases)
