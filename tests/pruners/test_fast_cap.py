"""FastCAP against float64: the shared block, its saliencies, and the sweep column by column."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_cap.errors import ConfigError, GradientError, PatternError
from lightning_cap.pruners import CAP, FastCAP
from lightning_cap.pruners.fast_cap import shared_blocks
from lightning_cap.sparsity.allocation import Uniform
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.patterns import BlockOf, NofM, OutputRows, Pattern
from lightning_cap.sparsity.targets import Targets
from tests.references.dense import least_in_groups, least_mask, right_sweep, saliencies
from tests.references.obs import obs_block
from tests.support.problems import Rows, gradient_rows, random_targets

SHAPES = {"a": (10, 12), "b": (6, 8)}


@pytest.fixture
def targets() -> Targets:
    return random_targets(SHAPES, seed=4)


@pytest.fixture
def rows(targets: Targets) -> Rows:
    return gradient_rows(targets, 60)


def _padded(values: np.ndarray, B: int) -> np.ndarray:
    """``(..., O, I)`` -> ``(..., O, P, B)``, zeros after the end of each row."""
    extra = -values.shape[-1] % B
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, extra)])
    return padded.reshape(*values.shape[:-1], -1, B)


def _shared(rows: Rows, name: str, B: int) -> tuple[np.ndarray, np.ndarray]:
    """``(P, B, B)``, the mean Fisher over output rows at each place, and the traces ``(O, P)`` of every block's own."""
    whole = np.concatenate([chunk[name].flatten(2).double().numpy() for chunk in rows])  # (N, O, I)
    blocks = _padded(whole, B)
    own = np.einsum("nopi,nopj->opij", blocks, blocks) / len(blocks)
    return own.mean(0), np.trace(own, axis1=-2, axis2=-1)


@pytest.mark.parametrize("B", [1, 7, 8, 12, 500])
def test_the_shared_blocks(targets: Targets, rows: Rows, B: int) -> None:
    layout = targets.row_blocks(B)
    found = shared_blocks(layout, rows, torch.device("cpu"))
    assert list(found) == list(SHAPES)
    for name, fisher in found.items():
        mean, traces = _shared(rows, name, layout.block_size)
        assert fisher.mean.dtype == fisher.traces.dtype == torch.float64
        np.testing.assert_allclose(fisher.mean.numpy(), mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(fisher.traces.numpy(), traces, rtol=1e-4, atol=1e-5)


def test_the_shared_blocks_follow_the_order_of_groups() -> None:
    weight = {"conv": torch.randn(3, 4, 2, 2)}
    rows = gradient_rows(weight, 30)
    turned = [{"conv": chunk["conv"].permute(0, 1, 3, 4, 2).reshape(-1, 3, 16)} for chunk in rows]
    layout = BlockLayout({"conv": (3, 4, 2, 2)}, 16, 4, by_row=True)
    found = shared_blocks(layout, rows, torch.device("cpu"))["conv"]
    np.testing.assert_allclose(found.mean.numpy(), _shared(turned, "conv", 16)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [None, NofM(2, 4), BlockOf(4), BlockOf(2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("B", "columns", "damp"), [(8, 8, 1e-1), (4, 4, 1e-3), (24, 100, 1e-2), (12, 8, 1e-2)])
def test_the_sweep(
    targets: Targets, rows: Rows, pattern: Pattern | None, masked: bool, B: int, columns: int, damp: float
) -> None:
    size = pattern.n if isinstance(pattern, BlockOf) else 1
    generator = torch.Generator().manual_seed(8)
    masks = {n: torch.rand(math.prod(s) // size, 1, generator=generator).expand(-1, size).reshape(s)
             >= (0.2 if masked else 0.0) for n, s in SHAPES.items()}  # fmt: skip
    pruner = FastCAP(block_size=B, num_gradients=60, damp=damp, columns=columns, pattern=pattern, allocation=Uniform())
    path = pruner.path(targets, rows, masks)
    sparsity = 0.5 if isinstance(pattern, NofM) else 0.6
    result = path.at(sparsity)
    predicted = 0.0
    size_b = targets.row_blocks(B, max(size, 4 if isinstance(pattern, NofM) else 1)).block_size
    for name, weight in targets.weights().items():
        outputs, inputs = weight.shape
        alive = _padded(masks[name].numpy(), size_b).reshape(-1, size_b)
        w = np.where(alive, _padded(weight.double().numpy(), size_b).reshape(-1, size_b), 0.0)
        mean, traces = _shared(rows, name, size_b)
        traces = traces + damp * size_b
        scale = (traces / traces.mean(0)).ravel()
        fisher = np.tile(mean + damp * np.eye(size_b), (outputs, 1, 1))
        inverse = np.linalg.inv(fisher)
        every = np.ones(size_b, dtype=bool)
        costs = np.stack([s * saliencies(h, row, every, size) for s, h, row in zip(scale, inverse, w, strict=True)])
        costs = np.where(alive[:, ::size], costs, np.inf)
        zeros = round(sparsity * weight.numel()) - int((~masks[name]).sum())
        first = least_in_groups(costs, alive, 2, 4) if isinstance(pattern, NofM) else least_mask(costs, zeros // size)
        predicted += costs[first].sum()
        first = np.repeat(first, size, axis=1)

        def choose(
            part: slice, now: np.ndarray, pivots: np.ndarray, first: Any = first, alive: Any = alive, scale: Any = scale
        ) -> np.ndarray:
            live = alive[:, part]
            scores = np.where(live, scale[:, None] * now**2 / pivots, np.inf)
            if isinstance(pattern, BlockOf):
                taken = first[:, part]
            elif isinstance(pattern, NofM):
                taken = least_in_groups(scores, live, 2, 4)
            else:
                taken = least_mask(scores, int(first[:, part].sum()))
            return taken | ~live

        moved, gone = right_sweep(fisher, w, choose, min(columns, size_b))
        untouched = ~(gone & alive).any(-1)
        expected = np.where(untouched[:, None], w, np.where(gone, 0.0, moved)).reshape(outputs, -1)[:, :inputs]
        kept = (alive & ~gone).reshape(outputs, -1)[:, :inputs]
        np.testing.assert_array_equal(result.masks[name].numpy(), kept)
        np.testing.assert_allclose(result.weights[name].numpy(), expected, rtol=2e-3, atol=2e-4)
    assert result.predicted_loss == pytest.approx(predicted, rel=1e-3)


def test_one_block_is_swept_to_the_optimum_of_the_columns_to_the_right(targets: Targets, rows: Rows) -> None:
    """Removing the first columns of a row by the sweep is OBS of them: nothing lies to their left."""
    with torch.no_grad():
        targets["b"][:, :4] = 1e-4  # so that they go
    result = (
        FastCAP(block_size=8, num_gradients=60, damp=1e-2, pattern=BlockOf(4), allocation=Uniform())
        .path(targets, rows)
        .at(0.5)
    )
    assert not result.masks["b"][:, :4].any()
    fisher = _shared(rows, "b", 8)[0][0]
    for k, row in enumerate(targets["b"].detach().double().numpy()):
        steps = obs_block(fisher, row, np.ones(8, dtype=bool), 1e-2, order=[0, 1, 2, 3, 4, 5, 6, 7]).weights
        np.testing.assert_allclose(result.weights["b"][k].numpy(), steps[4], rtol=1e-3, atol=1e-4)


def test_blocks_of_equal_statistics_are_solved_as_cap_does() -> None:
    """With blocks of one weight there is nothing but the diagonal."""
    targets = Targets({"a": nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))})
    rows = [{"a": chunk["a"][:, :1, :1].expand(-1, 4, 6).contiguous()} for chunk in gradient_rows(targets, 50)]
    ours, caps = (
        pruner(block_size=1, num_gradients=50, damp=1e-2).path(targets, rows).at(0.5) for pruner in (FastCAP, CAP)
    )
    assert torch.equal(ours.masks["a"], caps.masks["a"])
    torch.testing.assert_close(ours.weights["a"], caps.weights["a"])
    assert ours.predicted_loss == pytest.approx(caps.predicted_loss, rel=1e-4)


def test_what_does_not_work_is_refused(targets: Targets, rows: Rows) -> None:
    with pytest.raises(ConfigError, match="columns=0: give a whole number"):
        FastCAP(columns=0)
    with pytest.raises(ConfigError, match=r"damp=0: give a number above 0"):
        FastCAP(damp=0)
    with pytest.raises(PatternError, match=r"FastCAP works inside blocks"):
        FastCAP(pattern=OutputRows())
    with pytest.raises(GradientError, match="the source gave no gradient row"):
        FastCAP(block_size=8).path(targets, [])
    with pytest.raises(GradientError, match=r"rows of 'a' are missing, its weight has \(10, 12\)"):
        FastCAP(block_size=8).path(targets, [{"b": rows[0]["b"]}])
    alike = [{name: 1e8 * part[..., :1].expand_as(part) for name, part in chunk.items()} for chunk in rows]
    with pytest.warns(UserWarning, match=r"damp=0\.01: \d+ shared Fisher blocks factored only with a larger one"):
        assert FastCAP(block_size=12, damp=1e-2).path(targets, alike[:1]).stats["largest_damp"] > 1e-2
    rows[1]["b"][0, 0, 0] = torch.nan
    with pytest.raises(GradientError, match="those of 'b' are not finite"):
        FastCAP(block_size=8).path(targets, rows)
