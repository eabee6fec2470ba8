"""`prune` on a model that `fully_shard` has shared out over two gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_cap import prune
from lightning_cap.pruners import CAP
from lightning_cap.utilities import distributed, sharded
from tests.support.processes import on_ranks
from tests.support.sharding import Images, make_net, make_sharded
from tests.support.toy import loss


def prune_here(fully_sharded: bool) -> dict[str, Any]:
    """Every process has every other batch of two rows."""
    model = make_sharded() if fully_sharded else make_net()
    images = torch.utils.data.DataLoader(Images(), batch_size=4)
    batches = list(images)[distributed.rank() :: distributed.world_size()]
    pruner = CAP(block_size=32, num_gradients=16, samples_per_gradient=2, damp=1e-3, shrinkage=0.0)
    result = prune(model, batches, loss, 0.6, pruner, num_recomputations=2, progress=False)
    sharded.reshard(model)
    weights = {name: sharded.whole(weight.detach()).clone() for name, weight in model.named_parameters()}
    return {"weights": weights, "sparsity": result.sparsity, "targets": list(result.masks)}


def test_every_process_prunes_the_weights_that_it_holds(tmp_path: Path) -> None:
    one = prune_here(False)
    for found in on_ranks(2, tmp_path, prune_here, True):
        assert found["targets"] == one["targets"] == ["2.weight", "5.weight", "7.weight"]
        assert found["sparsity"] == one["sparsity"]
        for name, weight in one["weights"].items():
            assert torch.equal(found["weights"][name] == 0, weight == 0)
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-6)
