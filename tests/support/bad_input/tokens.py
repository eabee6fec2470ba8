"""Bad input to token pruning: models without tokens, and arguments out of range."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from lightning_cap import VisionClassifier
from lightning_cap.errors import ConfigError
from lightning_cap.tokens import (
    DynamicViT,
    KeptTokenDistillation,
    ZeroTPrune,
    most_redundant,
    token_importance,
    weighted_page_rank,
)
from tests.support.bad_input.table import NO_COUNTS, NO_NUMBERS, Line, wrong
from tests.support.tokens import images, pruned, vit

VIT = vit(depth=3)
ZEROT = pruned(ZeroTPrune)
AVERAGED, DIFFERENTIAL = vit(global_pool="avg", depth=3), vit(attn_layer="diff", depth=3)
MASKLESS: Any = vit(depth=3)  # as blocks of an older timm are
for block in MASKLESS.blocks:
    block.forward = lambda x: x
NAN = float("nan")
NO_RATIOS: tuple[Any, ...] = (0, 0.0, -0.1, 1.1, "0.8", None, True, NAN, float("inf"), 1j, {"a": 0.8}, torch.ones(2))
NO_BLOCKS: tuple[Any, ...] = (3, None, "3", {3: 1}, [], [0], [-1], [1.0], [True], ["1"], [2, 1], [1, 1], [NAN])
ATTENTION = torch.ones(2, 3, 4, 4) / 4


def named(name: str, run: Callable[[], Any], *words: str) -> Line:
    return Line(f"tokens: {name}", lambda _: run(), ConfigError, words)


def vit_without_class() -> Any:
    return timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, class_token=False, global_pool="avg")


def _classifier(folder: Path) -> Any:
    return VisionClassifier(DynamicViT(timm.create_model("resnet10t", num_classes=3)))


def of_both(argument: str, *values: Any, words: tuple[str, ...] = ()) -> list[Line]:
    given = {"model": VIT, "blocks": [1, 2]}
    given.pop(argument, None)
    return [
        line for kind in (DynamicViT, ZeroTPrune) for line in wrong(kind, argument, *values, given=given, words=words)
    ]


def no_tokens(name: str, make: Callable[[], Any], *words: str) -> list[Line]:
    return [
        named(f"{kind.__name__} of {name}", lambda k=kind: k(make(), [1]), *words) for kind in (DynamicViT, ZeroTPrune)
    ]


LINES = [
    *of_both("model", None, 3, True, ["vit_tiny_patch16_224"], nn.Linear, "vit_tinny", "", {"class_path": "a.B"}),
    *of_both("blocks", *NO_BLOCKS),
    *of_both("blocks", [3], [1, 7], words=("the model has 3 blocks",)),
    *of_both("keep_ratio", *NO_RATIOS),
    *of_both("keep_ratio", [0.8], [0.8, 0.8, 0.8], [], words=("one for each of blocks=",)),
    *[named(f"{kind.__name__} keep_ratio of a stage {bad!r}", lambda k=kind, b=bad: k(VIT, [1, 2], [0.8, b]), "keep_ratio=")
      for kind in (DynamicViT, ZeroTPrune) for bad in (0, 1.5, "0.8", None, True, NAN)],
    *of_both("pretrained", None, "yes", 1),
    *of_both("checkpoint", 3, True, ""),
    *of_both("model_kwargs", "img_size", 3, [1]),
    *no_tokens("a ResNet", lambda: timm.create_model("resnet10t"), "model=ResNet", "no tokens", "'vit_tiny_patch16_224'"),
    *no_tokens("a ResNet by name", lambda: "resnet10t", "model=ResNet", "no tokens"),
    *no_tokens("a layer", lambda: nn.Linear(3, 4), "model=Linear", "no tokens"),
    *no_tokens("a hierarchy", lambda: timm.create_model("pvt_v2_b0"), "no tokens"),
    *no_tokens("no class token", lambda: vit_without_class(), "no class token"),
    named("kwargs of a module", lambda: ZeroTPrune(VIT, [1], model_kwargs={"num_classes": 3}), "model_kwargs={'num_classes': 3}"),
    named("weights of both kinds", lambda: ZeroTPrune("vit_tiny_patch16_224", pretrained=True, checkpoint="a.pt"), "keep one"),
    named("pooling of all tokens", lambda: DynamicViT(AVERAGED, [1]), "global_pool='avg'"),
    named("another attention", lambda: ZeroTPrune(DIFFERENTIAL, [1]), "its block 0", "leave 1 out of blocks="),
    *wrong(DynamicViT, "temperature", *NO_NUMBERS, 0, -1.0, given={"model": VIT, "blocks": [1]}),
    *wrong(DynamicViT, "ratio_weight", *NO_NUMBERS, -1.0, given={"model": VIT, "blocks": [1]}),
    *wrong(ZeroTPrune, "similarity", *NO_NUMBERS, -0.1, 1.1, given={"model": VIT, "blocks": [1]}),
    *wrong(ZeroTPrune, "merge", None, 1, "yes", [True], NAN, given={"model": VIT, "blocks": [1]}),
    named("blocks without a mask", lambda: ZeroTPrune(MASKLESS, [1]), "its block 1", "or merge=False"),
    named("training without a mask", lambda: DynamicViT(MASKLESS, [1]), "its block 0", "takes no attn_mask"),
    *wrong(ZeroTPrune, "iterations", *NO_COUNTS, given={"model": VIT, "blocks": [1]}),
    *wrong(ZeroTPrune, "head_variance", 0.5, "all", True, [0.1], [0.5, 0.1], [NAN, 1.0], [-1.0, 1.0], (0.1, "1"), {"a": 1},
           given={"model": VIT, "blocks": [1]}),
    Line("tokens: in a classifier", _classifier, ConfigError, ("model=ResNet", "no tokens")),
    *[named(f"return_tokens={bad!r}", lambda b=bad: ZEROT(images(), b), "return_tokens=") for bad in (1, "yes", None)],
    *wrong(KeptTokenDistillation, "teacher", None, 3, True, ["vit"], nn.Linear, "vit_tinny", {"a": 1}),
    *wrong(KeptTokenDistillation, "alpha", *NO_NUMBERS, -0.1, 1.1, given={"teacher": VIT}),
    *wrong(KeptTokenDistillation, "temperature", *NO_NUMBERS, 0, given={"teacher": VIT}),
    *wrong(KeptTokenDistillation, "token_weight", *NO_NUMBERS, -1, given={"teacher": VIT}),
    named("teacher without tokens", lambda: KeptTokenDistillation("resnet10t"), "layer='norm'"),
    *wrong(weighted_page_rank, "attention", None, "a", 3, [[1.0]], given={"iterations": 2}),
    *wrong(weighted_page_rank, "iterations", *NO_COUNTS, given={"attention": ATTENTION}),
    *wrong(weighted_page_rank, "start", 1.0, "a", [1.0], given={"attention": ATTENTION, "iterations": 2}),
    named("a rank of no square", lambda: weighted_page_rank(torch.ones(2, 3), 1), "attention of shape (2, 3)"),
    named("a rank of counts", lambda: weighted_page_rank(torch.ones(3, 3, dtype=torch.int64), 1), "attention of shape (3, 3)"),
    named("a start of others", lambda: weighted_page_rank(ATTENTION, 1, torch.ones(3)), "start of shape (3,)"),
    *wrong(token_importance, "attention", None, "a", 3, given={"iterations": 2}),
    *wrong(token_importance, "iterations", *NO_COUNTS, given={"attention": ATTENTION}),
    *wrong(token_importance, "prefix", *NO_COUNTS, given={"attention": ATTENTION, "iterations": 2}),
    *wrong(token_importance, "prefix", 4, 9, given={"attention": ATTENTION, "iterations": 2}),
    *wrong(token_importance, "head_variance", 0.5, "all", [0.1], [1, 0], given={"attention": ATTENTION, "iterations": 2}),
    named("importance of one head", lambda: token_importance(torch.ones(4, 4), 1), "attention of shape (4, 4)"),
    *wrong(most_redundant, "features", None, "a", 3, given={"importance": torch.ones(1, 4), "count": 1}),
    *wrong(most_redundant, "importance", None, "a", 3, given={"features": torch.ones(1, 4, 2), "count": 1}),
    *wrong(most_redundant, "count", "1", None, True, 1.0, -1, 3, NAN,
           given={"features": torch.ones(1, 4, 2), "importance": torch.ones(1, 4)}),
    named("redundancy of others", lambda: most_redundant(torch.ones(1, 4, 2), torch.ones(1, 3), 1), "importance of shape (1, 3)"),
]  # fmt: skip
