from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_cap.sparsity.patterns import Unstructured
from tests.references.obs import best_weights, obs_block
from tests.support.blocks import Eliminate, Reconstruct, order_of, problem


@pytest.mark.parametrize("kind", ["random", "few", "duplicated", "scaled"])
@pytest.mark.parametrize("B", [1, 7, 48])
def test_every_prefix_is_the_textbook_state_and_the_best_there_is(
    eliminate: Eliminate, reconstruct: Reconstruct, kind: str, B: int
) -> None:
    fisher, weights, alive = problem(kind, 2, B)
    out = eliminate(fisher, weights, alive, 1e-3, Unstructured())
    orders = [order_of(out, k) for k in range(2)]
    references = [
        obs_block(fisher[k].numpy(), weights[k].numpy(), alive[k].numpy(), 1e-3, order=orders[k]) for k in range(2)
    ]
    for count in range(0, B + 1, max(1, B // 8)):
        pruned = alive & (out.rank < count)
        result = reconstruct(fisher, weights, alive, pruned, out.damp, out.use_float64)
        for k in range(2):
            sequential = references[k].weights[min(count, len(orders[k]))]
            scale = np.abs(sequential).max() + 1.0
            np.testing.assert_allclose(result[k].numpy(), sequential, rtol=1e-3, atol=1e-3 * scale)
            A = alive[k].nonzero().squeeze(1).numpy()
            best = best_weights(fisher[k].numpy()[np.ix_(A, A)], weights[k].numpy()[A], ~pruned[k].numpy()[A], 1e-3)
            np.testing.assert_allclose(result[k].numpy()[A], best, rtol=1e-3, atol=1e-4 * scale)
        assert not result[pruned | ~alive].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "few"])
def test_untouched_blocks_are_returned_bit_for_bit(
    eliminate: Eliminate, reconstruct: Reconstruct, kind: str, dtype: torch.dtype
) -> None:
    fisher, weights, alive = problem(kind, 3, 16)
    weights = weights.to(dtype) + torch.randn(3, 16, dtype=dtype) / 7
    out = eliminate(fisher, weights.float(), alive, 1e-3, Unstructured())
    pruned = alive & (out.rank < 6)
    pruned[1] = False
    result = reconstruct(fisher, weights, alive, pruned, out.damp, out.use_float64)
    assert result.dtype == dtype
    assert torch.equal(result[1], torch.where(alive[1], weights[1], 0.0))
    assert not torch.equal(result[0], torch.where(alive[0] & ~pruned[0], weights[0], 0.0))
    everything = reconstruct(fisher, weights, alive, alive, out.damp, out.use_float64)
    assert not everything.any()


def test_reconstruction_of_indefinite_blocks_raises_the_damp(reconstruct: Reconstruct) -> None:
    _, weights, alive = problem("random", 2, 16)
    fisher = torch.eye(16).repeat(2, 1, 1)
    fisher[0, 0, 0] = -5.0
    alive[:] = True
    pruned = torch.zeros_like(alive)
    pruned[:, 8:] = True
    damp = torch.full((2,), 1e-2, dtype=torch.float64)
    result = reconstruct(fisher, weights, alive, pruned, damp, torch.zeros(2, dtype=torch.bool))
    assert torch.equal(result, torch.where(pruned, 0.0, weights)), "nothing is correlated"
