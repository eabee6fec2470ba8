"""`ZeroTPrune`: which tokens go, by the attention and the keys of the block before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_cap.tokens import ZeroTPrune, most_redundant, token_importance
from tests.support.tokens import BLOCKS, KEPT, PATCHES, images, pruned, vit


def seen_by(model: Any, block: int) -> tuple[Tensor, Tensor]:
    """Attention ``(b, heads, N, N)`` and keys ``(b, heads, N, d)`` of a block of the dense model, from its weights."""
    x = model.pos_drop(torch.cat([model.cls_token.expand(3, -1, -1), model.patch_embed(images())], 1) + model.pos_embed)
    for earlier in model.blocks[:block]:
        x = earlier(x)
    attention = model.blocks[block].attn
    q, k, _ = attention.qkv(model.blocks[block].norm1(x)).chunk(3, -1)
    q, k = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k))
    return (q @ k.mT / attention.head_dim**0.5).softmax(-1), k


@pytest.mark.parametrize("similarity", [0.0, 0.4, 1.0])
def test_the_least_important_go_and_then_those_that_are_alike(similarity: float) -> None:
    model = pruned(ZeroTPrune, blocks=[2], keep_ratio=0.6, similarity=similarity, iterations=4)
    with torch.no_grad():
        attention, keys = seen_by(model.vit, 1)
    importance = token_importance(attention, 4)
    kept = model(images(), return_tokens=True).kept
    going = round(similarity * 10)  # of 25 stay 15
    for image in range(3):
        left = sorted(sorted(range(PATCHES), key=lambda i: -float(importance[image, i]))[: 15 + going])
        features = keys[image, :, 1:].transpose(0, 1).flatten(1)[left]
        alike = most_redundant(features[None], importance[image][left][None], going)[0].tolist()
        assert kept[image].tolist() == [place for rank, place in enumerate(left) if rank not in alike]


@pytest.mark.parametrize("fused", [True, False])
def test_merging_tokens_that_are_equal_changes_nothing(fused: bool) -> None:
    """Attention to n equal tokens is attention to one of size n."""
    model = vit()
    with torch.no_grad():
        model.pos_embed[:, 1:] = model.pos_embed[:, 1:2]
    for block in model.blocks:
        block.attn.fused_attn = fused
    same = images()[:, :, :4, :4].tile(5, 5)  # 25 times one patch
    other = images(seed=7)[:, :, :4, :4]
    same[:, :, :4, :4] = other
    tokens = {merge: ZeroTPrune(model, [1, 3], 0.3, merge=merge).eval()(same) for merge in (True, False)}
    torch.testing.assert_close(tokens[True], model(same), rtol=1e-4, atol=1e-4)
    assert (tokens[False] - model(same)).abs().max() > 0.01


def test_every_patch_is_in_one_token_at_the_end() -> None:
    class Sized(ZeroTPrune):
        def reduce(self, tokens: Tensor, sizes: Tensor | None, seen: Any, chosen: Tensor) -> Any:
            tokens, sizes = super().reduce(tokens, sizes, seen, chosen)
            counted.append(sizes)
            return tokens, sizes

    counted: list[Any] = []
    pruned(Sized)(images())
    assert [sizes.shape for sizes in counted] == [(3, 1 + kept) for kept in KEPT]
    assert all(torch.equal(sizes.sum(1), torch.full((3,), 1.0 + PATCHES)) for sizes in counted)
    assert all(bool((sizes[:, 0] == 1).all()) for sizes in counted)


def test_dropped_tokens_are_the_merged_ones() -> None:
    """At the first stage the same ones stay."""
    kept = [pruned(ZeroTPrune, blocks=[2], merge=merge)(images(), return_tokens=True).kept for merge in (True, False)]
    assert torch.equal(*kept)


def test_positions_of_later_stages_are_those_in_the_image() -> None:
    """What is left at the end was left after each stage, and the tokens are those of a model that had these alone from there on."""
    model = pruned(ZeroTPrune)
    last = model(images(), return_tokens=True).kept
    for stages in (1, 2):
        earlier = pruned(ZeroTPrune, blocks=BLOCKS[:stages])(images(), return_tokens=True).kept
        assert all(set(a) >= set(b) for a, b in zip(earlier.tolist(), last.tolist(), strict=True))


def test_it_has_no_parameters_of_its_own_and_takes_the_weights_of_the_model() -> None:
    model = pruned(ZeroTPrune)
    assert {name.removeprefix("vit.") for name in model.state_dict()} == set(vit().state_dict())
    assert model.num_kept(PATCHES) == KEPT


def test_it_trains() -> None:
    model = pruned(ZeroTPrune).train()
    model(images()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_other_pooling_and_query_norms_are_taken() -> None:
    for changes in ({"global_pool": "avg"}, {"qk_norm": True}, {"init_values": 0.1}, {"no_embed_class": True}):
        assert pruned(ZeroTPrune, vit=changes)(images()).shape == (3, 4)


def test_fewer_are_alike_than_could_be() -> None:
    """Where more than half of the tokens go, the less important half cannot give them all."""
    model = pruned(ZeroTPrune, blocks=[1], keep_ratio=0.2, similarity=1.0)
    assert model(images(), return_tokens=True).kept.shape == (3, 5)


def test_autocast() -> None:
    model = pruned(ZeroTPrune)
    with torch.autocast("cpu", torch.bfloat16):
        assert bool(model(images()).isfinite().all())
