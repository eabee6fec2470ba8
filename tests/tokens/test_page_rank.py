"""The weighted page rank and the heads put together, against plain float64 loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_cap.tokens import token_importance, weighted_page_rank

N, HEADS = 9, 4


def attention(seed: int = 0, sharpness: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.0, sharpness, HEADS, dtype=torch.float64)[
        :, None, None
    ]  # the first head tells nothing apart
    return (scale * torch.randn(2, HEADS, N, N, generator=generator, dtype=torch.float64)).softmax(-1)


def plain_rank(matrix: list[list[float]], iterations: int, start: list[float]) -> list[float]:
    """Each token gets from each other what that one attends to it, times what it is worth itself."""
    scores = start
    for _ in range(iterations):
        scores = [sum(scores[j] * matrix[j][i] for j in range(len(matrix))) for i in range(len(matrix))]
    return scores


def plain_importance(
    heads: Tensor, iterations: int, prefix: int, bounds: tuple[float, float] | None
) -> tuple[list[float], int]:
    """Of one image, and how many heads count."""
    weight = [math.sqrt(N)] + [1.0] * (N - 1)
    start = [w / sum(weight) for w in weight]
    each = [[N * s for s in plain_rank(head.tolist(), iterations, start)[prefix:]] for head in heads]
    kept = []
    for scores in each:
        mean = sum(scores) / len(scores)
        variance = sum((s - mean) ** 2 for s in scores) / len(scores)
        if bounds is None or bounds[0] <= variance <= bounds[1]:
            kept.append(scores)
    counted = kept or each
    return [math.sqrt(sum(s[i] ** 2 for s in counted) / len(counted)) for i in range(N - prefix)], len(kept)


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_the_rank_is_its_definition(iterations: int) -> None:
    weights = attention()
    found = weighted_page_rank(weights, iterations)
    for image in range(2):
        for head in range(HEADS):
            plain = plain_rank(weights[image, head].tolist(), iterations, [1 / N] * N)
            assert found[image, head].tolist() == pytest.approx(plain, rel=1e-12)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, HEADS, dtype=torch.float64))


def test_the_rank_comes_to_the_stationary_distribution() -> None:
    weights = attention()[0, 2]
    rank = weighted_page_rank(weights, 200)
    torch.testing.assert_close(rank @ weights, rank)
    values, vectors = torch.linalg.eig(weights.T)
    leading = vectors[:, values.real.argmax()].real
    torch.testing.assert_close(rank, leading / leading.sum())


def test_another_start() -> None:
    weights = attention()[0, 1]
    start = torch.arange(1.0, N + 1, dtype=torch.float64)
    plain = plain_rank(weights.tolist(), 2, start.tolist())
    assert weighted_page_rank(weights, 2, start).tolist() == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize("bounds", [None, (0.01, 0.7), (0.001, 0.05), (50.0, 60.0)])
@pytest.mark.parametrize("prefix", [1, 2])
def test_importance_is_its_definition(bounds: tuple[float, float] | None, prefix: int) -> None:
    weights = attention()
    found = token_importance(weights, 3, prefix, bounds)
    counted = []
    for image in range(2):
        plain, heads = plain_importance(weights[image], 3, prefix, bounds)
        counted.append(heads)
        assert found[image].tolist() == pytest.approx(plain, rel=1e-12)
    if bounds == (0.01, 0.7):
        assert all(0 < heads < HEADS for heads in counted)  # some are left out
    if bounds == (50.0, 60.0):
        assert counted == [0, 0]  # then all count


def test_half_precision_is_summed_in_float32() -> None:
    found = token_importance(attention().bfloat16(), 3)
    assert found.dtype == torch.float32
    assert torch.equal(found, token_importance(attention().bfloat16().float(), 3))
