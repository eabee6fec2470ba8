"""Token pruning without training and without parameters: the attention of the model itself tells which tokens matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.tokens.base import TokenPruning, highest
from lightning_cap.tokens.page_rank import check_head_variance, token_importance
from lightning_cap.tokens.similarity import merge_into_nearest, most_redundant, take, without
from lightning_cap.tokens.vision_transformer import Attended, require_mask
from lightning_cap.utilities.arguments import require_flag, require_real, require_whole


class ZeroTPrune(TokenPruning):
    """A vision transformer that leaves tokens out by its own attention, in the manner of Zero-TPrune (Wang et al., CVPR 2024).

    Before each of ``blocks`` the attention of the block before is read as a graph: the tokens of least weighted page rank go
    (`token_importance`), then those whose keys are most like the key of a more important one (`most_redundant`). A token that goes
    is averaged into the one that stays and has the most similar key, and attention counts it there, as in token merging (Bolya et
    al., ICLR 2023); the paper drops it (``merge=False``). Nothing is trained and nothing is added to the model, so that it can be
    put around any checkpoint, also one that CAP has pruned.

    Args:
        model: See `TokenPruning`, as for the next two and the last three.
        blocks: Their attention is that of the block before.
        keep_ratio: Of each stage.
        similarity: Share in [0, 1] of the tokens that go which go for their similarity.
        iterations: Steps of the page rank. One was best on ViT-Tiny; the paper takes up to 50 in early blocks.
        head_variance: Heads that count, see `token_importance`; None for all, which was better there than the paper's (0.01, 0.7).
        merge: Average tokens that go into others. Where the model pools all tokens at its end, each counts as one there.
        pretrained: Of a timm name.
        checkpoint: A local file of weights.
        model_kwargs: Of a timm name.

    Raises:
        ConfigError: As of `TokenPruning`; or a block before a stage has no softmax attention, or, to merge, a later one takes no
            ``attn_mask``.
    """

    reads_attention = True

    def __init__(
        self,
        model: str | nn.Module,
        blocks: Sequence[int] = (3, 6, 9),
        keep_ratio: float | Sequence[float] = 0.8,
        similarity: float = 0.5,
        iterations: int = 1,
        head_variance: tuple[float, float] | None = None,
        merge: bool = True,
        pretrained: bool = False,
        checkpoint: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        require_real("similarity", similarity, "[0, 1]", 0.5)
        require_whole("iterations", iterations, example=5)
        require_flag("merge", merge)
        if head_variance is not None:
            head_variance = check_head_variance(head_variance)
        super().__init__(model, blocks, keep_ratio, pretrained, checkpoint, model_kwargs)
        self.similarity, self.iterations, self.head_variance, self.merge = similarity, iterations, head_variance, merge
        for number, block in enumerate(self.vit.blocks[self.blocks[0] :] if merge else (), self.blocks[0]):
            require_mask(number, block, "merged tokens cannot be counted", ", or merge=False")

    @torch.no_grad()
    def choose(self, stage: int, tokens: Tensor, seen: Attended, count: int) -> Tensor:
        """By the attention and the keys of the block before."""
        assert seen.weights is not None
        prefix = self.vit.num_prefix_tokens
        importance = token_importance(seen.weights, self.iterations, prefix, self.head_variance)
        number = importance.shape[1]
        alike = min(math.floor(self.similarity * (number - count) + 0.5), count)
        left = highest(importance, count + alike)
        if not alike:
            return left
        going = most_redundant(take(self._keys(seen), left), importance.gather(1, left), alike)
        return left.gather(1, without(going, count + alike))

    def reduce(
        self, tokens: Tensor, sizes: Tensor | None, seen: Attended, chosen: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Those that go are averaged into others, or dropped."""
        if not self.merge:
            return super().reduce(tokens, sizes, seen, chosen)
        return merge_into_nearest(tokens, sizes, self._keys(seen), chosen, self.vit.num_prefix_tokens)

    def _keys(self, seen: Attended) -> Tensor:
        """Of the patch tokens, ``(b, P, heads * d)``."""
        assert seen.keys is not None
        return seen.keys[:, :, self.vit.num_prefix_tokens :].transpose(1, 2).flatten(2).float()
