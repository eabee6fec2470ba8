"""The attention inside of timm's blocks."""

from __future__ import annotations

import pytest
import torch

from lightning_cap.tokens.vision_transformer import attention_of
from tests.support.tokens import vit


def test_the_attention_of_a_block_is_seen_and_the_block_is_as_before() -> None:
    block = vit().blocks[0]
    x = torch.randn(2, 7, 24)
    expected, fused = block(x), block.attn.fused_attn
    with attention_of(block) as seen:
        out = block(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert seen.weights is not None
    assert seen.keys is not None
    assert seen.weights.shape == (2, 3, 7, 7)
    assert seen.keys.shape == (2, 3, 7, 8)
    torch.testing.assert_close(seen.weights.sum(-1), torch.ones(2, 3, 7))
    value = block.attn.qkv(block.norm1(x)).chunk(3, -1)[2].unflatten(-1, (3, 8)).transpose(1, 2)
    attended = block.attn.proj((seen.weights @ value).transpose(1, 2).flatten(2))
    after = x + attended
    torch.testing.assert_close(after + block.mlp(block.norm2(after)), expected, rtol=1e-4, atol=1e-5)
    assert block.attn.fused_attn == fused
    assert torch.equal(block(x), expected)


def test_it_is_as_before_after_a_failure_too() -> None:
    block = vit().blocks[0]
    fused = block.attn.fused_attn
    with pytest.raises(RuntimeError), attention_of(block):
        block(torch.randn(2, 7, 5))
    assert block.attn.fused_attn == fused
    assert not block.attn.attn_drop._forward_pre_hooks
    assert not block.attn.k_norm._forward_hooks
