"""FastCAP against float64: the shared block, its saliencies, and the sweep column by column."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference_dense import least_in_groups, least_mask, matrix_of, right_sweep, saliencies
from reference_obs import obs_block
from torch import Tensor, nn

from lightning_cap.allocation import Uniform
from lightning_cap.errors import ConfigError, GradientError, PatternError
from lightning_cap.layout import BlockLayout
from lightning_cap.patterns import BlockOf, NofM, OutputRows, Pattern
from lightning_cap.pruners import CAP, FastCAP
from lightning_cap.pruners.fast_cap import mean_blocks
from lightning_cap.targets import Targets

Rows = list[dict[str, Tensor]]
SHAPES = {"a": (10, 12), "b": (6, 8)}


@pytest.fixture
def targets() -> Targets:
    generator = torch.Generator().manual_seed(4)
    return Targets({n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()})


@pytest.fixture
def rows(targets: Targets, gradient_rows: Callable[..., Rows]) -> Rows:
    return gradient_rows(targets, 60)


def _padded(values: np.ndarray, B: int) -> np.ndarray:
    """``(..., d)`` -> ``(..., K, B)``, zeros after the end."""
    extra = -values.shape[-1] % B
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, extra)]).reshape(*values.shape[:-1], -1, B)


def _shared(rows: Rows, name: str, B: int) -> np.ndarray:
    blocks = _padded(matrix_of(rows, name), B)  # (N, K, B)
    return np.mean([g.T @ g / len(g) for g in blocks.swapaxes(0, 1)], axis=0)


@pytest.mark.parametrize("B", [1, 7, 16, 48, 500])
def test_the_mean_block(targets: Targets, rows: Rows, B: int) -> None:
    found = mean_blocks(BlockLayout(SHAPES, B), rows, torch.device("cpu"))
    assert list(found) == list(SHAPES)
    for name, block in found.items():
        assert block.shape == (B, B)
        assert block.dtype == torch.float64
        np.testing.assert_allclose(block.numpy(), _shared(rows, name, B), rtol=1e-4, atol=1e-5)


def test_the_mean_block_follows_the_order_of_groups(gradient_rows: Callable[..., Rows]) -> None:
    weight = {"conv": torch.randn(3, 4, 2, 2)}
    rows = gradient_rows(weight, 30)
    turned = [{"conv": chunk["conv"].permute(0, 1, 3, 4, 2).reshape(-1, 3, 16)} for chunk in rows]
    found = mean_blocks(BlockLayout({"conv": (3, 4, 2, 2)}, 16, 4), rows, torch.device("cpu"))["conv"]
    np.testing.assert_allclose(found.numpy(), _shared(turned, "conv", 16), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [None, NofM(2, 4), BlockOf(4), BlockOf(2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("B", "columns", "damp"), [(8, 8, 1e-1), (16, 4, 1e-3), (24, 100, 1e-2), (40, 8, 1e-2)])
def test_the_sweep(
    targets: Targets, rows: Rows, pattern: Pattern | None, masked: bool, B: int, columns: int, damp: float
) -> None:
    size = pattern.n if isinstance(pattern, BlockOf) else 1
    generator = torch.Generator().manual_seed(8)
    masks = {n: torch.rand(math.prod(s) // size, 1, generator=generator).expand(-1, size).reshape(s)
             >= (0.2 if masked else 0.0) for n, s in SHAPES.items()}  # fmt: skip
    pruner = FastCAP(B, 60, damp=damp, columns=columns, pattern=pattern, allocation=Uniform())
    path = pruner.path(targets, rows, masks)
    sparsity = 0.5 if isinstance(pattern, NofM) else 0.6
    result = path.at(sparsity)
    predicted = 0.0
    for name, weight in targets.weights().items():
        alive = _padded(masks[name].numpy().ravel(), B)
        w = np.where(alive, _padded(weight.double().numpy().ravel(), B), 0.0)
        fisher = _shared(rows, name, B) + damp * np.eye(B)
        inverse = np.linalg.inv(fisher)
        costs = np.stack([saliencies(inverse, row, np.ones(B, dtype=bool), size) for row in w])
        costs = np.where(alive[:, ::size], costs, np.inf)
        zeros = round(sparsity * weight.numel()) - int((~masks[name]).sum())
        first = least_in_groups(costs, alive, 2, 4) if isinstance(pattern, NofM) else least_mask(costs, zeros // size)
        predicted += costs[first].sum()
        first = np.repeat(first, size, axis=1)

        def choose(
            part: slice, now: np.ndarray, pivots: np.ndarray, first: Any = first, alive: Any = alive
        ) -> np.ndarray:
            live = alive[:, part]
            scores = np.where(live, now**2 / pivots, np.inf)
            if isinstance(pattern, BlockOf):
                taken = first[:, part]
            elif isinstance(pattern, NofM):
                taken = least_in_groups(scores, live, 2, 4)
            else:
                taken = least_mask(scores, int(first[:, part].sum()))
            return taken | ~live

        moved, gone = right_sweep(fisher, w, choose, min(columns, B))
        untouched = ~(gone & alive).any(-1)
        expected = np.where(untouched[:, None], w, np.where(gone, 0.0, moved)).ravel()[: weight.numel()]
        kept = (alive & ~gone).ravel()[: weight.numel()]
        np.testing.assert_array_equal(result.masks[name].numpy().ravel(), kept)
        np.testing.assert_allclose(result.weights[name].numpy().ravel(), expected, rtol=2e-3, atol=2e-4)
    assert result.predicted_loss == pytest.approx(predicted, rel=1e-3)


def test_one_block_is_swept_to_the_optimum_of_the_columns_to_the_right(targets: Targets, rows: Rows) -> None:
    """Removing the first columns of a row by the sweep is OBS of them: nothing lies to their left."""
    with torch.no_grad():
        targets["b"][:, :4] = 1e-4  # so that they go
    result = FastCAP(8, 60, damp=1e-2, pattern=BlockOf(4), allocation=Uniform()).path(targets, rows).at(0.5)
    assert not result.masks["b"][:, :4].any()
    fisher = _shared(rows, "b", 8)
    for k, row in enumerate(targets["b"].detach().double().numpy()):
        steps = obs_block(fisher, row, np.ones(8, dtype=bool), 1e-2, order=[0, 1, 2, 3, 4, 5, 6, 7]).weights
        np.testing.assert_allclose(result.weights["b"][k].numpy(), steps[4], rtol=1e-3, atol=1e-4)


def test_blocks_of_equal_statistics_are_solved_as_cap_does(gradient_rows: Callable[..., Rows]) -> None:
    """With blocks of one weight there is nothing but the diagonal."""
    targets = Targets({"a": nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))})
    rows = [{"a": chunk["a"][:, :1, :1].expand(-1, 4, 6).contiguous()} for chunk in gradient_rows(targets, 50)]
    ours, caps = (pruner(1, num_gradients=50, damp=1e-2).path(targets, rows).at(0.5) for pruner in (FastCAP, CAP))
    assert torch.equal(ours.masks["a"], caps.masks["a"])
    torch.testing.assert_close(ours.weights["a"], caps.weights["a"])
    assert ours.predicted_loss == pytest.approx(caps.predicted_loss, rel=1e-4)


def test_what_does_not_work_is_refused(targets: Targets, rows: Rows) -> None:
    with pytest.raises(ConfigError, match="columns=0: give a whole number"):
        FastCAP(columns=0)
    with pytest.raises(ConfigError, match=r"damp=0: the Fisher needs a positive damp"):
        FastCAP(damp=0)
    with pytest.raises(PatternError, match=r"FastCAP works inside blocks"):
        FastCAP(pattern=OutputRows())
    with pytest.raises(GradientError, match="the source gave no gradient row"):
        FastCAP(8).path(targets, [])
    with pytest.raises(GradientError, match=r"rows of 'a' have shape None, its weight has \(10, 12\)"):
        FastCAP(8).path(targets, [{"b": rows[0]["b"]}])
    rows[1]["b"][0, 0, 0] = torch.nan
    with pytest.raises(GradientError, match="those of 'b' are not finite"):
        FastCAP(8).path(targets, rows)
