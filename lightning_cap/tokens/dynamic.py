"""Token pruning that is learned: DynamicViT (Rao et al., NeurIPS 2021), as in appendix H.2 of the CAP paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_cap.errors import ConfigError
from lightning_cap.tokens.base import TokenPruning, highest
from lightning_cap.tokens.predictor import TokenPredictor
from lightning_cap.tokens.vision_transformer import Attended, require_mask
from lightning_cap.utilities.arguments import require_real

_MASKED = 1e-10  # what is left of a masked token in the attention: its gradient needs a finite logarithm
_MASKED_IN_HALF = 2**-10  # float16 would round its share of the attention to zero, and with it the gradient


class DynamicViT(TokenPruning):
    """A vision transformer with predictors that say before some blocks which tokens stay.

    In training all tokens stay where they are: predictors draw a hard decision for each by the Gumbel-softmax, and a token that
    is out is masked in the attention of all others, from then on. In evaluation each stage really keeps the ``k`` tokens of the
    highest probability. `auxiliary_loss` draws the kept shares to ``keep_ratio``; `VisionClassifier` adds it by itself, a module
    of your own adds it to its loss. To learn from the dense model as well, see `KeptTokenDistillation`.

    The predictors (``predictors.*``, 4 Linear layers each) are left dense when CAP prunes with its default targets: which tokens
    are taken has no gradient in evaluation, where the Fisher is collected. Pruners without gradients take them by ``include``.

    Args:
        model: See `TokenPruning`, as for the next two and the last three. It pools by its class token.
        blocks: A predictor is before each.
        keep_ratio: Of each stage. One that keeps all has no predictor.
        temperature: Of the Gumbel-softmax.
        ratio_weight: Factor of `auxiliary_loss`, which is added beside all other losses. It is 2 in the paper, where the loss of
            the labels has the factor 1; `KeptTokenDistillation` gives that ``1 - alpha``.
        pretrained: Of a timm name.
        checkpoint: A local file of weights of the transformer, without predictors.
        model_kwargs: Of a timm name.

    Raises:
        ConfigError: As of `TokenPruning`; or the model pools all tokens, or its blocks take no attention mask.
    """

    def __init__(
        self,
        model: str | nn.Module,
        blocks: Sequence[int] = (3, 6, 9),
        keep_ratio: float | Sequence[float] = 0.8,
        temperature: float = 1.0,
        ratio_weight: float = 2.0,
        pretrained: bool = False,
        checkpoint: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        require_real("temperature", temperature, "(0, inf)", 1.0)
        require_real("ratio_weight", ratio_weight, "[0, inf)", 2.0)
        super().__init__(model, blocks, keep_ratio, pretrained, checkpoint, model_kwargs)
        vit: Any = self.vit
        if vit.global_pool != "token":
            raise ConfigError(
                f"model: it pools its tokens by global_pool={vit.global_pool!r}, so that masked ones would count. Give one with "
                "global_pool='token'."
            )
        for number, block in enumerate(vit.blocks):
            require_mask(number, block, "tokens cannot be masked in training")
        self.temperature, self.ratio_weight = temperature, ratio_weight
        pruning = [share < before for share, before in zip(self.kept_shares, (1.0, *self.kept_shares), strict=False)]
        like = vit.cls_token
        self.predictors = nn.ModuleDict(
            {
                str(number): TokenPredictor(vit.embed_dim, like.dtype, like.device)
                for number, is_pruning in zip(self.blocks, pruning, strict=True)
                if is_pruning
            }
        )
        self._ratio_loss: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one step: a tensor with a graph can be neither copied nor pickled."""
        return {**self.__dict__, "_ratio_loss": None}

    def auxiliary_loss(self) -> Tensor | float:
        """``ratio_weight`` times the mean squared distance of the kept shares of the last batch from those wanted.

        Over images and stages (equation 11 of DynamicViT). 0 in evaluation, where they are kept exactly; it is given once.
        """
        last, self._ratio_loss = self._ratio_loss, None
        return 0.0 if last is None or not self.training else self.ratio_weight * last

    def run_blocks(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """In evaluation as `TokenPruning` does; in training on all tokens with masks, which are given for positions."""
        if not self.training or not self.predictors:
            return super().run_blocks(tokens)
        prefix = self.vit.num_prefix_tokens
        policy = tokens.new_ones(tokens.shape[0], tokens.shape[1] - prefix)
        distances = []
        mask = None
        for number, block in enumerate(self.vit.blocks):
            if str(number) in self.predictors:
                scores = self.predictors[str(number)](tokens[:, prefix:], policy)
                policy = policy * self.decide(scores).to(policy.dtype)
                wanted = self.kept_shares[self.blocks.index(number)]
                distances.append((policy.mean(1) - wanted).square().mean())
                mask = attention_mask(policy, prefix, _MASKED_IN_HALF if _in_half(tokens) else _MASKED)
            tokens = self.run_block(block, tokens, mask)
        self._ratio_loss = torch.stack(distances).mean()
        return tokens, policy

    def decide(self, scores: Tensor) -> Tensor:
        """1 for tokens that stay, 0 for others, ``(b, P)``: drawn by log-probabilities ``(b, P, 2)``, straight-through gradient."""
        return F.gumbel_softmax(scores.float(), self.temperature, hard=True)[..., 1]

    def choose(self, stage: int, tokens: Tensor, seen: Attended, count: int) -> Tensor:
        """Those of the highest probability."""
        scores = self.predictors[str(self.blocks[stage])](tokens[:, self.vit.num_prefix_tokens :])
        return highest(scores[..., 1], count)


def _in_half(tokens: Tensor) -> bool:
    """Whether attention is computed in float16."""
    kind = tokens.device.type
    by_autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return tokens.dtype == torch.float16 or by_autocast


def attention_mask(policy: Tensor, prefix: int, floor: float = _MASKED) -> Tensor:
    """What is added to attention scores so that no token attends to one that is out, but each to itself (equation 10).

    Args:
        policy: 1 for patch tokens that stay, 0 for others, ``(b, P)``.
        prefix: Tokens before them, which stay.
        floor: What is left of a token that is out.

    Returns:
        ``(b, 1, N, N)``, N = prefix + P. The softmax then has the factor that DynamicViT puts into it, and its gradient.
    """
    columns = F.pad((policy + floor).log(), (prefix, 0))
    number = columns.shape[1]
    others = 1 - torch.eye(number, dtype=columns.dtype, device=columns.device)
    return columns[:, None, None, :] * others
