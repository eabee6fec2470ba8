from __future__ import annotations

import pytest
import torch

from lightning_cap.comparison import fisher_block
from lightning_cap.comparison.fisher_block import average_blocks, check_block_size
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


def test_a_block_that_there_is_no_memory_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = Targets({"a": torch.zeros(100, 100), "b": torch.zeros(100, 100)})
    check_block_size(targets, 10_000)
    monkeypatch.setattr(fisher_block, "free_memory", lambda device: 24 * 2**20)
    check_block_size(targets, 1024)
    with pytest.raises(ConfigError, match=r"fisher_block=1025: .*24\.0 MiB.* at most 1024"):
        check_block_size(targets, 1025)
