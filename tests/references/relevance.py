"""Layer-wise relevance propagation through `SmallNet` by plain loops in float64: what the pruner of units must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.units import HEADS, WIDTH, SmallNet

STABILIZER = 1e-6  # zennit's own


def _away(value: float, epsilon: float) -> float:
    return value + (epsilon if value >= 0 else -epsilon)


def linear_epsilon(weight: Tensor, bias: Tensor, a: Tensor, relevance: Tensor, epsilon: float) -> Tensor:
    """``(I,)`` of inputs ``a``, from ``(O,)``: ``R_i = Σ_j a_i w_ji / (z_j + ε sign z_j) R_j``."""
    out = torch.zeros_like(a)
    for j in range(len(weight)):
        z = float(bias[j]) + sum(float(weight[j, i] * a[i]) for i in range(len(a)))
        for i in range(len(a)):
            out[i] += a[i] * weight[j, i] / _away(z, epsilon) * relevance[j]
    return out


def linear_positive(weight: Tensor, bias: Tensor, a: Tensor, relevance: Tensor) -> Tensor:
    """The same by α1β0: of what is added up, the positive parts alone."""
    out = torch.zeros_like(a)
    for j in range(len(weight)):
        parts = [max(0.0, float(weight[j, i] * a[i])) for i in range(len(a))]
        z = max(0.0, float(bias[j])) + sum(parts)
        for i in range(len(a)):
            out[i] += parts[i] / (z + STABILIZER) * relevance[j]
    return out


def convolution_positive(weight: Tensor, bias: Tensor, a: Tensor, relevance: Tensor) -> Tensor:
    """Of ``a (I, H, W)`` from ``(O, h, w)``, stride 1, no padding: each place is a linear layer on its window."""
    out = torch.zeros_like(a)
    k = weight.shape[-1]
    for y in range(relevance.shape[1]):
        for x in range(relevance.shape[2]):
            window = a[:, y : y + k, x : x + k]
            found = linear_positive(weight.flatten(1), bias, window.flatten(), relevance[:, y, x])
            out[:, y : y + k, x : x + k] += found.view_as(window)
    return out


@torch.no_grad()
def relevance_of_small_net(model: SmallNet, image: Tensor, label: int, epsilon: float) -> dict[str, Tensor]:
    """``{group: (size)}`` for one image ``(2, 5, 5)``: ε at Linear layers, α1β0 at convolutions."""
    a = model.bn(model.conv1(image[None])).relu()[0]
    wide, side = model.conv2(a[None])[0], model.side(a[None])[0][:, 1:-1, 1:-1]
    y = (wide + side).relu()
    tokens = y.flatten(1).T
    q, k, v = model.qkv(tokens).unflatten(1, (3, HEADS, WIDTH)).permute(1, 2, 0, 3)
    attention = (q @ k.mT).softmax(-1)
    heads = attention @ v  # (heads, tokens, width)
    out = heads.permute(1, 0, 2).flatten(1)
    each = model.proj(out)
    z = each.mean(0)
    hidden = torch.nn.functional.gelu(model.fc1(z))
    logits = model.fc2(hidden)

    start = torch.zeros_like(logits)
    start[label] = logits[label]
    of_hidden = linear_epsilon(model.fc2.weight, model.fc2.bias, hidden, start, epsilon)
    of_z = linear_epsilon(model.fc1.weight, model.fc1.bias, z, of_hidden, epsilon)
    of_each = each / len(each) / z * of_z
    of_out = torch.stack(
        [linear_epsilon(model.proj.weight, model.proj.bias, out[t], of_each[t], epsilon) for t in range(len(out))]
    )
    of_v = torch.zeros_like(v)
    for head in range(HEADS):
        for t in range(len(out)):
            for s in range(len(out)):
                share = attention[head, t, s] * v[head, s] / heads[head, t]
                of_v[head, s] += share * of_out[t].view(HEADS, WIDTH)[head]
    of_qkv = torch.zeros(len(out), 3, HEADS, WIDTH, dtype=torch.float64)
    of_qkv[:, 2] = of_v.permute(1, 0, 2)
    of_tokens = torch.stack(
        [
            linear_epsilon(model.qkv.weight, model.qkv.bias, tokens[t], of_qkv[t].flatten(), epsilon)
            for t in range(len(out))
        ]
    )
    of_y = of_tokens.T.reshape_as(y)
    parts = [torch.where(y > 0, part / (wide + side), 0.0) * of_y for part in (wide, side)]
    assert model.conv2.bias is not None
    of_a = convolution_positive(model.conv2.weight, model.conv2.bias, a, parts[0])
    inner = a[:, 1:-1, 1:-1]
    of_a[:, 1:-1, 1:-1] += convolution_positive(model.side.weight, torch.zeros(5), inner, parts[1])
    return {
        "conv1": of_a.flatten(1).sum(1),
        "conv2": of_tokens.sum(0),
        "attn": of_out.view(-1, HEADS, WIDTH).sum((0, 2)),
        "fc1": of_hidden,
    }
