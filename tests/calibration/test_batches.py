from __future__ import annotations

import random
from collections import UserDict
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, WeightedRandomSampler

from lightning_cap.calibration.batches import CalibrationBatches, batch_size, slice_batch
from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.errors import DataError, GradientError
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from tests.support.toy import FEATURES, ToyData, loss, plain_net


def collect(loader: Any, count: int = 24, m: int = 1, seed: int = 0, event: int = 0) -> torch.Tensor:
    return torch.cat([x for x, _ in CalibrationBatches(loader, count, m, seed, event)])


def mixing(batch: list[Any]) -> Any:
    """A collate function with randomness of its own, as mixup is."""
    x, y = torch.utils.data.default_collate(batch)
    lam = random.random() * float(np.random.rand())
    return lam * x + (1 - lam) * x[torch.randperm(len(x))], y


@pytest.mark.parametrize("collate", [None, mixing])
def test_samples_depend_neither_on_workers_nor_on_the_random_state(collate: Any) -> None:
    rows = []
    for workers, seed in ((0, 1), (0, 2), (1, 3), (2, 4)):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        loader = DataLoader(ToyData(), batch_size=8, shuffle=True, num_workers=workers, collate_fn=collate)
        rows.append(collect(loader))
    for other in rows[1:]:
        assert torch.equal(rows[0], other)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_same_samples(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    loader = DataLoader(ToyData(), batch_size=4, collate_fn=mixing)
    whole = collect(loader, 24)
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    parts: list[list[torch.Tensor]] = []
    for r in range(world):
        monkeypatch.setattr(distributed, "rank", lambda r=r: r)
        parts.append([x for x, _ in CalibrationBatches(loader, 24, 1, 0, 0)])
    merged = [parts[j % world][j // world] for j in range(6)]
    assert torch.equal(whole, torch.cat(merged))


def test_seed_and_event_change_samples_and_augmentation() -> None:
    loader = DataLoader(ToyData(), batch_size=8)
    base = collect(loader)
    assert torch.equal(base, collect(loader))
    for other in (collect(loader, seed=1), collect(loader, event=1)):
        assert not any(torch.equal(row, again) for row, again in zip(base, other, strict=True))


def test_first_pass_has_no_duplicates_and_later_passes_augment_anew() -> None:
    data = ToyData(16)
    rows = collect(DataLoader(data, batch_size=8), 48)
    passes = [data.seen[i : i + 16] for i in range(0, 48, 16)]
    assert all(sorted(p) == list(range(16)) for p in passes)
    assert passes[0] != passes[1]
    assert len({tuple(row.tolist()) for row in rows}) == 48


@pytest.mark.parametrize(("m", "own", "size"), [(1, 8, 8), (3, 8, 6), (5, 4, 5), (4, 4, 4)])
def test_batches_are_whole_gradient_samples(m: int, own: int, size: int) -> None:
    batches = list(CalibrationBatches(DataLoader(ToyData(), batch_size=own), 20, m, 0, 0))
    assert {len(y) for _, y in batches} == {size}
    assert sum(len(y) for _, y in batches) >= 20


def test_the_loader_and_the_random_state_are_left_alone() -> None:
    loader = DataLoader(ToyData(), batch_size=8, shuffle=True, num_workers=1)
    torch.manual_seed(0)
    order = [y.tolist() for _, y in loader]
    torch.manual_seed(0)
    batches = iter(CalibrationBatches(loader, 16, 1, 0, 0))
    next(batches)  # workers run, but this process draws nothing
    assert [y.tolist() for _, y in loader] == order


def test_a_special_sampler_is_respected() -> None:
    data = ToyData(40)
    only = WeightedRandomSampler([0.0] * 39 + [1.0], 40)
    collect(DataLoader(data, batch_size=8, sampler=only), 16)
    assert set(data.seen) == {39}


def test_iterable_data_sets() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            for i in range(10):
                yield torch.full((1,), float(i)) + torch.rand(1), torch.tensor(i)

    loader = DataLoader(Stream(), batch_size=4)
    rows = collect(loader, 24)
    assert rows.flatten().int().tolist() == [*range(10), *range(10), *range(4)]
    torch.manual_seed(123)
    assert torch.equal(rows, collect(loader, 24))
    assert rows[0] != rows[10]  # augmented anew in the second pass


def test_plain_lists_of_batches_pass_through() -> None:
    batches = [(torch.full((4, 1), float(i)), torch.zeros(4)) for i in range(3)]
    assert collect(batches).flatten().tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


def test_empty_and_unbatched_sources_are_refused() -> None:
    with pytest.raises(DataError, match="data set is empty"):
        collect(DataLoader(Subset(ToyData(), []), batch_size=4))
    with pytest.raises(DataError, match="batch_size=None"):
        collect(DataLoader(ToyData(), batch_size=None))

    class Empty(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(DataError, match="iterable data set is empty"):
        collect(DataLoader(Empty(), batch_size=4))


class Encoding(UserDict[str, Any]):
    """As a tokenizer gives: a dict in an object, with more in it."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__(data)
        self.more = "kept"


def test_a_user_dict_is_split_into_samples() -> None:
    batch = (Encoding({"x": torch.arange(8.0).view(4, 2), "name": "a"}), [torch.arange(4)])
    assert batch_size((Encoding({"x": torch.ones(3)}), 1)) == 3
    first, (y,) = slice_batch(batch, 4, 1, 3)
    assert type(first) is Encoding
    assert (first["x"].tolist(), first["name"], first.more, y.tolist()) == ([[2, 3], [4, 5]], "a", "kept", [1, 2])
    assert batch[0]["x"].shape == (4, 2)


def test_rows_of_a_user_dict() -> None:
    model = plain_net()
    targets = Targets.from_model(model)
    x, y = torch.randn(6, FEATURES), torch.arange(6) % 4

    def of_dict(m: nn.Module, batch: Any) -> torch.Tensor:
        return loss(m, (batch[0].data["x"], batch[1]))

    (wanted,) = GradientCollector(model, targets, loss, [(x, y)], 6)
    (found,) = GradientCollector(model, targets, of_dict, [(Encoding({"x": x}), y)], 6)
    for name, rows in wanted.items():
        assert torch.equal(found[name], rows)


def test_what_cannot_be_split_is_named() -> None:
    @dataclass
    class Sample:
        x: torch.Tensor

    for batch in ((Sample(torch.ones(4, 2)), torch.ones(4)), {"a": MappingProxyType({"x": torch.ones(4)})}):
        with pytest.raises(
            GradientError, match=r"a batch holds a (Sample|mappingproxy), .*let collate_fn return dict\(batch\)"
        ):
            batch_size(batch)
