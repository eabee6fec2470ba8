"""Tokens that say what others say already: the similarity stage of Zero-TPrune."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_cap.errors import ConfigError
from lightning_cap.utilities.arguments import require_instance, require_whole


def most_redundant(features: Tensor, importance: Tensor, count: int) -> Tensor:
    """Of the less important half of the tokens those that are most like one of the more important half.

    Args:
        features: Of each token, ``(b, P, d)``, such as its key. They are compared by their cosine.
        importance: ``(b, P)``.
        count: How many, at most ``P // 2``.

    Returns:
        Their positions, int64 ``(b, count)``, the most alike first.

    Raises:
        ConfigError: Shapes do not fit, or there are fewer.
    """
    require_instance("features", features, Tensor, "torch.randn(8, 196, 64)")
    require_instance("importance", importance, Tensor, "torch.rand(8, 196)")
    if features.dim() != 3 or importance.shape != features.shape[:2]:
        raise ConfigError(
            f"importance of shape {tuple(importance.shape)} and features of {tuple(features.shape)}: give (b, P) and (b, P, d)."
        )
    half = features.shape[1] // 2
    require_whole("count", count, at_least=0, at_most=half)
    order = importance.topk(importance.shape[1], dim=1).indices
    ranked = F.normalize(features, dim=-1).gather(1, order.unsqueeze(-1).expand_as(features))
    more, less = ranked[:, : features.shape[1] - half], ranked[:, features.shape[1] - half :]
    nearest = (less @ more.transpose(1, 2)).amax(-1)
    found = nearest.topk(count, dim=1).indices + (features.shape[1] - half)
    return order.gather(1, found)


def merge_into_nearest(
    tokens: Tensor, sizes: Tensor | None, features: Tensor, chosen: Tensor, prefix: int
) -> tuple[Tensor, Tensor]:
    """Average each token that goes into the one that stays and is most like it, as token merging does (Bolya et al., ICLR 2023).

    Args:
        tokens: ``(b, N, C)``.
        sizes: Of how many tokens each is the mean, ``(b, N)``. None: of one.
        features: Of each but the first ``prefix`` ones, ``(b, P, d)``. They are compared by their cosine.
        chosen: Positions of those that stay, int64 ``(b, k)``, among the same.
        prefix: So many first ones stay as they are.

    Returns:
        Means weighted by sizes, ``(b, prefix + k, C)``, in the order of ``chosen``, and the new sizes ``(b, prefix + k)``.
    """
    sizes = tokens.new_ones(tokens.shape[:2]) if sizes is None else sizes
    going = without(chosen, features.shape[1])
    features = F.normalize(features, dim=-1)
    nearest = (take(features, going) @ take(features, chosen).transpose(1, 2)).argmax(-1)

    def added(values: Tensor) -> Tensor:
        first, rest = values[:, :prefix], values[:, prefix:]
        to = nearest.unsqueeze(-1).expand(-1, -1, values.shape[2])
        return torch.cat([first, take(rest, chosen).scatter_add(1, to, take(rest, going))], 1)

    weights = sizes.unsqueeze(-1)
    total = added(weights)
    return added(tokens * weights) / total, total.squeeze(-1)


def take(values: Tensor, positions: Tensor) -> Tensor:
    """Rows of ``(b, N, d)`` at positions ``(b, k)``: ``(b, k, d)``."""
    return values.gather(1, positions.unsqueeze(-1).expand(-1, -1, values.shape[2]))


def without(positions: Tensor, number: int) -> Tensor:
    """Those of ``range(number)`` that are not among the positions ``(b, r)``: rising, int64 ``(b, number - r)``."""
    marked = torch.zeros(positions.shape[0], number, dtype=torch.int64, device=positions.device)
    marked = marked.scatter(1, positions, 1)
    places = torch.arange(number, device=positions.device)
    return (-places - number * marked).topk(number - positions.shape[1], dim=1).indices  # ONNX has no stable sort
