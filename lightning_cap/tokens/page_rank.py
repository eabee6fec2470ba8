"""Importance of tokens by their attention alone: the weighted page rank of Zero-TPrune (Wang, Dedhia, Jha, CVPR 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import is_real, require_instance, require_whole, shown

#: A head whose scores, times their number, vary less than this tells all tokens alike; one above looks at a few alone.
HEAD_VARIANCE = (0.01, 0.7)


def weighted_page_rank(attention: Tensor, iterations: int, start: Tensor | None = None) -> Tensor:
    """Importance of each token: what others that are important attend to. A step is ``s <- Aᵀ s`` (algorithm 1 of Zero-TPrune).

    Args:
        attention: Weights after the softmax, ``(..., N, N)``: row ``i`` is what token ``i`` attends to, and sums to 1.
        iterations: Steps; the sum of the scores stays as it is.
        start: First scores ``(..., N)``. Default: ``1 / N`` each.

    Returns:
        Scores ``(..., N)``.

    Raises:
        ConfigError: An argument is something else, or shapes do not fit.
    """
    require_instance("attention", attention, Tensor, "q.matmul(k.mT).softmax(-1)")
    require_whole("iterations", iterations, example=5)
    require_instance("start", start, Tensor, "torch.full((8, 197), 1 / 197)", optional=True)
    if attention.dim() < 2 or attention.shape[-1] != attention.shape[-2] or not attention.is_floating_point():
        raise ConfigError(f"attention of shape {tuple(attention.shape)}: give weights (..., N, N).")
    if start is None:
        start = attention.new_full(attention.shape[:-1], 1 / attention.shape[-1])
    elif start.shape[-1] != attention.shape[-1]:
        raise ConfigError(f"start of shape {tuple(start.shape)}: give scores (..., {attention.shape[-1]}).")
    scores = start.unsqueeze(-2)
    for _ in range(iterations):
        scores = scores @ attention
    return scores.squeeze(-2)


def token_importance(
    attention: Tensor, iterations: int, prefix: int = 1, head_variance: tuple[float, float] | None = None
) -> Tensor:
    """The page rank of each patch token, the heads of a layer put together.

    The class token begins with ``√N`` times the score of another one. Heads are put together by the root of their mean square,
    which keeps what is important to some of them (the paper's emphasis on informative regions), without those that are the same
    for all tokens or heap up on a few (its variance-based filter); where that leaves none, of all heads.

    Args:
        attention: ``(b, heads, N, N)``, see `weighted_page_rank`.
        iterations: Likewise.
        prefix: How many class and register tokens come first; the class token is the very first.
        head_variance: Smallest and largest variance of a head's scores times N that counts. None: all heads.

    Returns:
        ``(b, N - prefix)``, float32 or better.

    Raises:
        ConfigError: An argument is something else.
    """
    require_instance("attention", attention, Tensor, "q.matmul(k.mT).softmax(-1)")
    require_whole("prefix", prefix, at_least=1)
    if attention.dim() != 4:
        raise ConfigError(f"attention of shape {tuple(attention.shape)}: give weights (b, heads, N, N).")
    if prefix >= attention.shape[-1]:
        raise ConfigError(f"prefix={prefix}: of {attention.shape[-1]} tokens none is left. Give fewer.")
    attention = attention if attention.dtype == torch.float64 else attention.float()
    number = attention.shape[-1]
    start = torch.cat([attention.new_full((1,), number**0.5), attention.new_ones(number - 1)])
    scores = weighted_page_rank(attention, iterations, (start / start.sum()).expand(attention.shape[:-1]))
    scores = scores[..., prefix:] * number
    if head_variance is None:
        return scores.square().mean(1).sqrt()
    low, high = check_head_variance(head_variance)
    variance = scores.var(-1, correction=0)
    counts = ((variance >= low) & (variance <= high)).to(scores.dtype)
    counts = torch.where(counts.sum(1, keepdim=True) > 0, counts, torch.ones_like(counts))
    return ((scores.square() * counts.unsqueeze(-1)).sum(1) / counts.sum(1, keepdim=True)).sqrt()


def check_head_variance(value: object) -> tuple[float, float]:
    """Two numbers, the second above the first.

    Raises:
        ConfigError: Something else.
    """
    pair = value if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(map(is_real, pair)) or not 0 <= pair[0] < pair[1]:
        raise ConfigError(f"head_variance={shown(value)}: give two numbers, from and to, such as [0.01, 0.7], or None.")
    return float(pair[0]), float(pair[1])
