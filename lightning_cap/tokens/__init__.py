"""Vision transformers that leave tokens out on the way: learned, or without any training."""

from __future__ import annotations

from lightning_cap.tokens.base import TokenOutput, TokenPruning
from lightning_cap.tokens.distillation import KeptTokenDistillation
from lightning_cap.tokens.dynamic import DynamicViT
from lightning_cap.tokens.page_rank import token_importance, weighted_page_rank
from lightning_cap.tokens.similarity import most_redundant
from lightning_cap.tokens.zero_shot import ZeroTPrune

__all__ = [
    "DynamicViT",
    "KeptTokenDistillation",
    "TokenOutput",
    "TokenPruning",
    "ZeroTPrune",
    "most_redundant",
    "token_importance",
    "weighted_page_rank",
]
