from __future__ import annotations

import pytest
import torch

from lightning_cap.comparison.fisher_block import average_blocks
from lightning_cap.errors import ConfigError
from lightning_cap.sparsity.targets import Targets


def test_the_average_block_is_that_of_the_dense_computation() -> None:
    torch.manual_seed(1)
    weights = {"a": torch.zeros(5, 7), "b": torch.zeros(16), "c": torch.zeros(3)}
    rows = {name: torch.randn(10, *w.shape) for name, w in weights.items()}
    chunks = [{n: r[:4] for n, r in rows.items()}, {n: r[4:] for n, r in rows.items()}]
    got = average_blocks(Targets(weights), chunks, 8)
    found = []
    for name, count in (("a", 4), ("b", 2)):
        flat = rows[name].flatten(1)
        blocks = [flat[:, 8 * k : 8 * k + 8].T @ flat[:, 8 * k : 8 * k + 8] / 10 for k in range(count)]
        torch.testing.assert_close(got[name], torch.stack(blocks).mean(0))
        found += blocks
    torch.testing.assert_close(got["all"], torch.stack(found).mean(0))
    assert set(got) == {"all", "a", "b"}
    with pytest.raises(ConfigError, match="fisher_block=36"):
        average_blocks(Targets(weights), chunks, 36)
