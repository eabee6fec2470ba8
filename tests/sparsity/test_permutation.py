"""Channel permutation: the model computes the same, and N:M keeps more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from lightning_cap.sparsity import NofM, Targets, permute_channels
from lightning_cap.sparsity.permutation_search import best_order, kept_score

pytestmark = pytest.mark.usefixtures("seeded")


def _vit() -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=8, patch_size=4, in_chans=3, num_classes=5, embed_dim=16, depth=2, num_heads=2
    )


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 5),
    )  # fmt: skip


def _kept(model: nn.Module, pattern: NofM) -> float:
    """Share of ``w²`` that the pattern keeps."""
    weights = [w.square().movedim(1, -1).flatten(0, -2) for w in Targets.from_model(model).weights().values()]
    return sum(kept_score(w, pattern.n, pattern.m) for w in weights) / sum(float(w.sum()) for w in weights)


@pytest.mark.parametrize("pattern", [NofM(2, 4), NofM(1, 4)])
@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (_vit, {"blocks.0.mlp", "blocks.1.mlp", "blocks.1.attn.0", "blocks.1.attn.1"}),
        (_convolutions, {"0", "3"}),
    ],
)
def test_the_model_computes_the_same_and_more_is_kept(
    make: Callable[[], nn.Module], groups: set[str], pattern: NofM
) -> None:
    model = make().eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():  # norms that are not all alike, and channels that are not
                tensor.mul_(0.5 + torch.rand(tensor.shape)).add_(0.1 * torch.rand(tensor.shape))
        if isinstance(model, nn.Sequential):
            model[3].weight *= torch.rand(8).view(-1, 1, 1)
    x = torch.randn(4, 3, 8, 8)
    before, kept = model(x).detach(), _kept(model, pattern)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = permute_channels(model, x, pattern)
    assert groups <= set(found.orders)
    assert all(order.sort().values.tolist() == list(range(len(order))) for order in found.orders.values())
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert found.after > found.before
    assert _kept(model, pattern) > kept
    for name, parameter in model.named_parameters():  # the same numbers elsewhere
        assert torch.equal(parameter.detach().flatten().sort().values, weights[name].flatten().sort().values)
    again = permute_channels(model, x, pattern)
    assert again.before == pytest.approx(found.after)


def test_scores_choose_what_counts() -> None:
    model = _convolutions().eval()
    x = torch.randn(2, 3, 8, 8)
    scores = {"3.weight": torch.zeros(12, 8, 3, 3)}
    scores["3.weight"][:, :4] = 1.0  # two of them would be lost
    first = model[0].weight.detach().clone()
    found = permute_channels(model, x, scores=scores)
    assert list(found.orders) == ["0"]
    assert (found.before, found.after) == (0.5, 1.0)
    halves = found.orders["0"].view(2, 4)
    assert [int((half < 4).sum()) for half in halves] == [2, 2]
    assert torch.equal(model[0].weight, first[found.orders["0"]])
    assert repr(found) == "ChannelOrders(1 groups, kept 0.5000 before, 1.0000 after)"
    moved = {"3.weight": scores["3.weight"][:, found.orders["0"]]}
    assert not permute_channels(model, x, scores=moved).orders  # nothing to win
    assert set(permute_channels(model, x, exclude=["0"]).orders) <= {"3"}


@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 2), (3, 4), (2, 8)])
def test_no_swap_leads_further(keep: int, group: int) -> None:
    scores = torch.rand(6, 16).pow(4)
    order = best_order(scores, keep, group)
    best = kept_score(scores[:, order], keep, group)
    assert best > kept_score(scores, keep, group)

    def swapped(p: int, q: int) -> Tensor:
        places = torch.arange(16)
        places[p], places[q] = q, p
        return order[places]

    assert all(kept_score(scores[:, swapped(p, q)], keep, group) <= best + 1e-5 for p in range(16) for q in range(p))
