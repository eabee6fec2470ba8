"""Attention with fewer heads than its input has channels for, where the module's own forward takes them to be as many."""

from __future__ import annotations

from typing import Any

from timm.models.cait import ClassAttn
from timm.models.vision_transformer import Attention
from timm.models.xcit import XCA
from torch import Tensor, nn
from torch.nn import functional as F


class NarrowAttention(Attention):
    """Self-attention of timm whose heads together are not as wide as its input. Made of one in place, by `narrow`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``(B, N, C)`` -> ``(B, N, C_out)``."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = attend(self.q_norm(q), self.k_norm(k), v, self, attn_mask, is_causal)
        return self.proj_drop(self.proj(out))  # type: ignore[no-any-return]


class NarrowXCA(XCA):
    """Cross-covariance attention of XCiT whose heads together are not as wide as its input. Made in place, by `narrow`."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> ``(B, N, C_out)``."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)  # (B, heads, channels of a head, N)
        q, k = F.normalize(q, dim=-1) * self.temperature, F.normalize(k, dim=-1)
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        else:
            out = self.attn_drop((q @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        out = out.permute(0, 3, 1, 2).flatten(2)
        return self.proj_drop(self.proj(out))  # type: ignore[no-any-return]


class NarrowClassAttention(ClassAttn):
    """Class attention of CaiT and XCiT whose heads together are not as wide as its input. Made in place, by `narrow`."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> ``(B, 1, C_out)``, for the first token."""
        B, N, _ = x.shape
        q = self.q(x[:, :1]).reshape(B, 1, self.num_heads, -1).transpose(1, 2)
        k = self.k(x).reshape(B, N, self.num_heads, -1).transpose(1, 2)
        v = self.v(x).reshape(B, N, self.num_heads, -1).transpose(1, 2)
        return self.proj_drop(self.proj(attend(q, k, v, self)))  # type: ignore[no-any-return]


def attend(q: Tensor, k: Tensor, v: Tensor, attention: Any, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """``(B, heads, N, D)`` of queries, keys and values -> ``(B, N, heads * D)``, as timm's modules do it."""
    if attention.fused_attn or mask is not None or causal:
        p = attention.attn_drop.p if attention.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=causal)
    else:
        weights = ((q * attention.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        out = attention.attn_drop(weights) @ v
    return out.transpose(1, 2).flatten(2)


def narrow(module: nn.Module) -> None:
    """Make an attention whose projections were cut one that runs, in place; any other module is left alone."""
    if isinstance(module, Attention) and not hasattr(module, "attn_dim"):  # timm before it had heads of any width
        _adopt(module, NarrowAttention, module.qkv)
    elif isinstance(module, XCA):
        _adopt(module, NarrowXCA, module.qkv)
    elif isinstance(module, ClassAttn):
        _adopt(module, NarrowClassAttention, module.q)


def _adopt(module: nn.Module, kind: type[nn.Module], query: nn.Linear) -> None:
    if module.proj.in_features != query.in_features:  # type: ignore[union-attr]
        module.__class__ = kind
