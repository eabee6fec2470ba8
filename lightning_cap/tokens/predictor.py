"""The small network that says of each token whether it stays, as in DynamicViT (Rao et al., NeurIPS 2021, section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn


class TokenPredictor(nn.Module):
    """Log-probabilities that tokens go and stay, of each token and the mean of those that are left.

    Args:
        dim: Channels ``C`` of a token, even.
        dtype: Of the weights.
        device: Likewise.
    """

    def __init__(self, dim: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> None:
        super().__init__()
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        self.norm = nn.LayerNorm(dim, **made)
        self.inside = nn.Linear(dim, dim, **made)
        self.hidden1 = nn.Linear(dim, dim // 2, **made)
        self.hidden2 = nn.Linear(dim // 2, max(2, dim // 4), **made)
        self.last = nn.Linear(max(2, dim // 4), 2, **made)
        for layer in (self.inside, self.hidden1, self.hidden2, self.last):
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, policy: Tensor | None = None) -> Tensor:
        """Log-probabilities ``(b, P, 2)``, of going and of staying.

        Args:
            tokens: Patch tokens ``(b, P, C)``.
            policy: 1 for those that are left, 0 for others, ``(b, P)``. None: all are.
        """
        x = F.gelu(self.inside(self.norm(tokens)))
        own, shared = x.tensor_split(2, dim=-1)
        if policy is None:
            mean = shared.mean(1, keepdim=True)
        else:
            weights = policy.unsqueeze(-1).to(shared.dtype)
            mean = (shared * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)
        x = torch.cat([own, mean.expand_as(shared)], -1)
        x = F.gelu(self.hidden2(F.gelu(self.hidden1(x))))
        return F.log_softmax(self.last(x), -1)
