"""Which tokens are redundant, against a plain loop."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_cap.tokens import most_redundant
from lightning_cap.tokens.similarity import merge_into_nearest, without


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


@pytest.mark.parametrize("prefix", [1, 2])
def test_tokens_are_averaged_into_the_nearest_by_their_sizes(prefix: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, prefix + 7, 4, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 5, (2, prefix + 7), generator=generator).double()
    features = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    chosen = torch.tensor([[0, 3, 4], [1, 2, 6]])
    merged, after = merge_into_nearest(tokens, sizes, features, chosen, prefix)
    for image in range(2):
        stay = chosen[image].tolist()
        groups = {place: [place] for place in stay}
        for token in set(range(7)) - set(stay):
            like = [float(F.cosine_similarity(features[image, token], features[image, j], dim=0)) for j in stay]
            groups[stay[like.index(max(like))]].append(token)
        rows = [(tokens[image, i], float(sizes[image, i])) for i in range(prefix)]
        for place in stay:
            members = [prefix + i for i in groups[place]]
            size = sum(float(sizes[image, i]) for i in members)
            rows.append((sum(float(sizes[image, i]) * tokens[image, i] for i in members) / size, size))  # type: ignore[arg-type]
        torch.testing.assert_close(merged[image], torch.stack([row for row, _ in rows]))
        assert after[image].tolist() == [size for _, size in rows]
    assert torch.equal(after.sum(1), sizes.sum(1))


def test_unmerged_tokens_are_of_size_1() -> None:
    tokens = torch.randn(1, 5, 4)
    _, sizes = merge_into_nearest(tokens, None, torch.randn(1, 4, 3), torch.tensor([[0, 1, 2]]), 1)
    assert sorted(sizes[0].tolist()) == [1, 1, 1, 2]
