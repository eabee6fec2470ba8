"""A vision transformer whose later blocks see fewer tokens: what all ways to choose them share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from lightning_cap.errors import ConfigError
from lightning_cap.tokens.vision_transformer import Attended, attention_of, embed, make_vit, require_attention
from lightning_cap.utilities.arguments import (
    is_real,
    is_whole,
    require_flag,
    require_list,
    require_real,
    require_whole,
    shown,
)


class TokenOutput(NamedTuple):
    """What a model with fewer tokens gives, with what it was computed from.

    Attributes:
        logits: ``(b, num_classes)``.
        tokens: After the last norm, ``(b, L, C)``, class and register tokens first.
        kept: Which of the P patch tokens those after the class and register tokens are: positions, int64 ``(b, L - prefix)``; or,
            where all are there but some are masked, 1 for each that is kept, ``(b, P)``; None where none is left out.
    """

    logits: Tensor
    tokens: Tensor
    kept: Tensor | None


class TokenPruning(nn.Module):
    """Base of the models that leave patch tokens out before some blocks of a timm `VisionTransformer`.

    The transformer is ``vit``, as it is: its weights are pruned, trained and exported like those of any model. Class and register
    tokens always stay. In evaluation a fixed number of tokens is kept in each stage, so that the model can be traced.

    Args:
        model: A timm `VisionTransformer` with a class token, or the name of one.
        blocks: Tokens are left out before these blocks, counted from 0; rising, from 1 on.
        keep_ratio: Share of the patch tokens that each stage keeps of those that are left, in (0, 1]; or a list, one a stage.
        pretrained: Of a timm name: load its published weights.
        checkpoint: A local file of weights of the transformer, see `load_weights`.
        model_kwargs: Of a timm name: further arguments of ``timm.create_model``, such as ``{"num_classes": 10}``.

    Raises:
        ConfigError: An argument is out of range, or the model has no class token, or no tokens at all.
    """

    #: Whether `choose` is told what the block before computed in its attention.
    reads_attention = False

    def __init__(
        self,
        model: str | nn.Module,
        blocks: Sequence[int] = (3, 6, 9),
        keep_ratio: float | Sequence[float] = 0.8,
        pretrained: bool = False,
        checkpoint: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        ratios = _checked(blocks, keep_ratio)
        self.vit = make_vit(model, pretrained, checkpoint, model_kwargs)
        depth = len(self.vit.blocks)
        if blocks[-1] >= depth:
            raise ConfigError(
                f"blocks={shown(blocks)}: the model has {depth} blocks. Give numbers from 1 to {depth - 1}."
            )
        self.blocks = tuple(int(number) for number in blocks)
        #: Share of all patch tokens that is left after each stage.
        self.kept_shares = tuple(math.prod(ratios[: stage + 1]) for stage in range(len(ratios)))
        for number in self.blocks if self.reads_attention else ():
            require_attention(number, self.vit.blocks[number - 1])

    @property
    def num_classes(self) -> int:
        """Of the transformer."""
        return int(self.vit.num_classes)

    @property
    def pretrained_cfg(self) -> Mapping[str, Any]:
        """timm's settings of the transformer with the names of layers in here; without ``architecture``: this is another one."""
        told = dict(getattr(self.vit, "pretrained_cfg", None) or {})
        told.pop("architecture", None)
        for name in ("first_conv", "classifier"):
            if isinstance(told.get(name), (list, tuple)):
                told[name] = tuple(f"vit.{layer}" for layer in told[name])
            elif told.get(name):
                told[name] = f"vit.{told[name]}"
        return told

    @property
    def patch_embed(self) -> nn.Module:
        """Of the transformer."""
        found: nn.Module = self.vit.patch_embed
        return found

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay is not for."""
        return {f"vit.{name}" for name in self.vit.no_weight_decay()}

    def num_kept(self, num_patches: int) -> tuple[int, ...]:
        """How many patch tokens are left after each stage.

        Args:
            num_patches: Of the image.

        Raises:
            ConfigError: It is no whole number of at least 1.
        """
        require_whole("num_patches", num_patches, example=196)
        return tuple(max(1, math.floor(share * num_patches + 0.5)) for share in self.kept_shares)

    def forward(self, images: Tensor, return_tokens: bool = False) -> Any:
        """Logits ``(b, num_classes)`` of images ``(b, C, H, W)``.

        Args:
            images: As the transformer takes them.
            return_tokens: Give a `TokenOutput` instead.

        Raises:
            ConfigError: ``return_tokens`` is neither True nor False.
        """
        require_flag("return_tokens", return_tokens)
        vit: Any = self.vit
        tokens, kept = self.run_blocks(embed(vit, images))
        tokens = vit.norm(tokens)
        logits = vit.forward_head(tokens)
        return TokenOutput(logits, tokens, kept) if return_tokens else logits

    def run_blocks(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """All blocks, each on the tokens that are left; the positions of those that are left at the end."""
        prefix = self.vit.num_prefix_tokens
        counts = dict(zip(self.blocks, self.num_kept(tokens.shape[1] - prefix), strict=True))
        kept: Tensor | None = None
        sizes: Tensor | None = None
        seen = Attended()
        left = tokens.shape[1] - prefix
        for number, block in enumerate(self.vit.blocks):
            if counts.get(number, left) < left:
                left = counts[number]
                chosen = self.choose(self.blocks.index(number), tokens, seen, left)
                tokens, sizes = self.reduce(tokens, sizes, seen, chosen)
                kept = chosen if kept is None else kept.gather(1, chosen)
            mask = None if sizes is None else sizes.log()[:, None, None, :]
            if self.reads_attention and counts.get(number + 1, left) < left:
                with attention_of(block) as seen:
                    tokens = call(block, tokens, mask)  # not recomputed: in the backward pass nobody would be looking
            else:
                tokens = self.run_block(block, tokens, mask)
        return tokens, kept

    def run_block(self, block: nn.Module, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """One block, recomputed in the backward pass if the transformer is set to be (``set_grad_checkpointing``)."""
        if self.vit.grad_checkpointing and self.training:
            out: Tensor = recompute(call, block, tokens, mask, use_reentrant=False)
            return out
        return call(block, tokens, mask)

    def reduce(
        self, tokens: Tensor, sizes: Tensor | None, seen: Attended, chosen: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens without those that are not chosen.

        Args:
            tokens: ``(b, N, C)``, class and register tokens first.
            sizes: Of how many tokens each is the mean, ``(b, N)``; None where each is one.
            seen: As for `choose`, which gave
            chosen: the positions.

        Returns:
            Tokens ``(b, prefix + count, C)`` and their sizes. Attention counts a token of size n as n tokens.
        """
        return gather(tokens, chosen, self.vit.num_prefix_tokens), None

    @abstractmethod
    def choose(self, stage: int, tokens: Tensor, seen: Attended, count: int) -> Tensor:
        """Which patch tokens stay.

        Args:
            stage: Of ``blocks``.
            tokens: ``(b, N, C)``, class and register tokens first.
            seen: What the attention of the block before computed, where `reads_attention`.
            count: How many stay.

        Returns:
            Rising positions among the patch tokens, int64 ``(b, count)``.
        """


def call(block: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The block; the mask is added to its attention scores."""
    out: Tensor = block(tokens) if mask is None else block(tokens, attn_mask=mask)
    return out


def gather(tokens: Tensor, chosen: Tensor, prefix: int) -> Tensor:
    """The first ``prefix`` tokens of ``(b, N, C)`` and, of the others, those at positions ``(b, k)``: ``(b, prefix + k, C)``."""
    places = nn.functional.pad(chosen + prefix, (prefix, 0))
    for first in range(1, prefix):
        places[:, first] = first
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


def highest(scores: Tensor, count: int) -> Tensor:
    """Rising positions of the highest of each row: ``(b, P)`` to int64 ``(b, count)``."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values


def _checked(blocks: object, keep_ratio: object) -> list[float]:
    """The keep ratio of each stage."""
    require_list("blocks", blocks, "[3, 6, 9]")
    numbers: list[Any] = list(blocks)  # type: ignore[call-overload]
    if not numbers:
        raise ConfigError(f"blocks={shown(blocks)}: give at least one, such as [3, 6, 9].")
    if not all(is_whole(number) and number >= 1 for number in numbers) or numbers != sorted(set(numbers)):
        raise ConfigError(
            f"blocks={shown(blocks)}: give whole numbers from 1 on, rising, each once, such as [3, 6, 9]."
        )
    if is_real(keep_ratio) or not isinstance(keep_ratio, Sequence) or isinstance(keep_ratio, str):
        require_real("keep_ratio", keep_ratio, "(0, 1]", 0.8)
        return [float(keep_ratio)] * len(numbers)  # type: ignore[arg-type]
    for ratio in keep_ratio:
        require_real("keep_ratio", ratio, "(0, 1]", 0.8)
    if len(keep_ratio) != len(numbers):
        raise ConfigError(
            f"keep_ratio={shown(keep_ratio)}: give one number, or one for each of blocks={shown(blocks)}."
        )
    return [float(ratio) for ratio in keep_ratio]
