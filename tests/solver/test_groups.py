"""CAP with whole groups against removal with the inverse recomputed after every group."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_cap.pruners import CAP
from lightning_cap.solver import eliminate
from lightning_cap.solver.groups import diagonal_groups, group_losses
from lightning_cap.sparsity.patterns import BlockOf
from lightning_cap.sparsity.targets import Targets
from tests.references.dense import obs_groups
from tests.references.obs import best_weights
from tests.support.problems import gradient_rows


def _problem(B: int, blocks: int, rows: int, masked: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(B) + torch.randn(blocks, B, B, generator=generator) / B**0.5
    G = torch.randn(blocks, rows, B, generator=generator) @ mix
    weights = torch.randn(blocks, B, generator=generator)
    alive = torch.rand(blocks, B, generator=generator) >= (0.3 if masked else 0.0)
    if masked:
        alive[0, :8] = False  # whole groups too
    return G.mT @ G / rows, weights.masked_fill(~alive, 0.0), alive


@pytest.mark.parametrize(("B", "size"), [(8, 4), (8, 2), (48, 4), (64, 4), (64, 16), (6, 6)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("damp", [1e-2, 1e-8])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_against_the_textbook(B: int, size: int, masked: bool, damp: float, backend: Any) -> None:
    fisher, weights, alive = _problem(B, 3, 3 * B, masked)
    out = eliminate(fisher, weights, alive, damp, BlockOf(size), backend=backend)
    assert torch.equal(out.steps, alive.sum(-1))
    assert torch.equal(out.rank < B, alive)
    for k in range(3):
        F, w, live = fisher[k].double().numpy() + damp * np.eye(B), weights[k].double().numpy(), alive[k].numpy()
        steps = out.rank[k].numpy().argsort(kind="stable")[: live.sum()]
        groups = steps // size
        ours = list(dict.fromkeys(groups.tolist()))
        assert len(ours) == np.count_nonzero(live.reshape(-1, size).any(-1)), "a group is left before it is gone"
        assert (np.diff([ours.index(g) for g in groups]) >= 0).all()
        order, losses, gaps = obs_groups(F, w, live, size)
        assert ours == order or min(gaps) < 1e-3
        members = live.reshape(-1, size).sum(-1)
        _, replayed, _ = obs_groups(F, w, live, size, ours)
        each = np.repeat(np.array(replayed) / members[ours], members[ours])
        np.testing.assert_allclose(out.losses[k].numpy()[: len(each)], each, rtol=2e-3, atol=1e-6)
        assert torch.isinf(out.losses[k][len(each) :]).all()
        assert sum(replayed[:2]) <= sum(losses[:2]) * (1 + 1e-3)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_group_losses_by_solving(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 8, 12, generator=generator, dtype=torch.float64)
    inverse = root @ root.mT / 12 + 0.1 * torch.eye(8)
    w = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    small = diagonal_groups(inverse, size)
    groups = w.view(5, -1, size)
    expected = 0.5 * (groups * torch.linalg.solve(small, groups)).sum(-1)
    torch.testing.assert_close(group_losses(small, torch.zeros_like(groups), groups), expected)
    for g in range(8 // size):
        part = slice(g * size, (g + 1) * size)
        assert torch.equal(small[:, g], inverse[:, part, part])


@pytest.mark.parametrize("ranking", ["marginal", "cumulative"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_path_cuts_at_whole_groups(ranking: Literal["marginal", "cumulative"], masked: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = {"a": (8, 16), "b": (3, 4), "c": (4, 8)}
    targets = Targets({n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()})
    rows = gradient_rows(targets, 80)
    masks = None
    if masked:  # as an earlier event left them
        masks = {n: (torch.rand(math.prod(s) // 4, 1, generator=generator) > 0.2).expand(-1, 4).reshape(s)
                 for n, s in shapes.items()}  # fmt: skip
    path = CAP(block_size=16, num_gradients=80, damp=1e-2, shrinkage=0.0, ranking=ranking, pattern=BlockOf(4)).path(
        targets, rows, masks
    )
    before = {name: torch.ones(s, dtype=torch.bool) for name, s in shapes.items()}
    for sparsity in (0.25, 0.31, 0.5, 0.77, 0.9, 0.99):
        result = path.at(sparsity)
        zeros = sum(int((~m).sum()) for m in result.masks.values())
        assert zeros == math.floor(sparsity * targets.numel + 0.5) // 4 * 4, "the most whole groups that fit"
        assert all(BlockOf(4).is_satisfied(mask) for mask in result.masks.values())
        assert all(not (mask & ~before[name]).any() for name, mask in result.masks.items())
        before = dict(result.masks)
        for name, mask in result.masks.items():
            G = torch.cat([chunk[name] for chunk in rows]).double().flatten(1)
            w, kept = targets[name].detach().double().flatten(), mask.flatten()
            live = masks[name].flatten() if masks else torch.ones_like(kept)
            for first in range(0, len(w), 16):
                part = slice(first, first + 16)
                F = (G[:, part].T @ G[:, part] / 80).numpy()
                expected = best_weights(F, torch.where(live, w, 0.0)[part].numpy(), kept[part].numpy(), 1e-2)
                got = result.weights[name].flatten()[part].numpy()
                np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4)


def test_zero_weights_and_zero_gradients_have_an_order_too() -> None:
    fisher, weights, alive = _problem(16, 2, 40, False)
    for F, w in ((torch.zeros_like(fisher), weights), (fisher, torch.zeros_like(weights))):
        out = eliminate(F, w, alive, 1e-8, BlockOf(4))
        assert torch.equal(out.rank.sort(-1).values, torch.arange(16).expand(2, 16).to(out.rank.dtype))
        assert out.losses.isfinite().all()
