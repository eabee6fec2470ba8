"""Which tokens are redundant, against a plain loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_cap.tokens import most_redundant
from lightning_cap.tokens.similarity import without


@pytest.mark.parametrize("number", [8, 9])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_it_is_the_definition(number: int, count: int) -> None:
    generator = torch.Generator().manual_seed(number)
    features = torch.randn(2, number, 5, generator=generator, dtype=torch.float64)
    importance = torch.rand(2, number, generator=generator, dtype=torch.float64)
    found = most_redundant(features, importance, count)
    for image in range(2):
        ranked = sorted(range(number), key=lambda i: -float(importance[image, i]))
        half = number - number // 2
        more, less = ranked[:half], ranked[half:]
        like = {
            i: max(float(F.cosine_similarity(features[image, i], features[image, j], dim=0)) for j in more)
            for i in less
        }
        assert found[image].tolist() == sorted(like, key=lambda i: -like[i])[:count]


def test_a_copy_of_an_important_token_goes_first() -> None:
    features = torch.eye(6)[None]
    features[0, 4] = 3 * features[0, 1]  # alike, though longer
    assert most_redundant(features, torch.tensor([[6.0, 5, 4, 3, 2, 1]]), 1).tolist() == [[4]]


def test_the_others_stay_in_order() -> None:
    assert without(torch.tensor([[3, 0], [1, 2]]), 5).tolist() == [[1, 2, 4], [0, 3, 4]]
    assert without(torch.empty(1, 0, dtype=torch.int64), 3).tolist() == [[0, 1, 2]]
