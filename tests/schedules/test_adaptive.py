"""The PQ index, its bound and the sparsities found by it, against plain loops over Python's floats."""

from __future__ import annotations

import math
import random

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_cap.errors import ConfigError, ScheduleError
from lightning_cap.schedules import PQAdaptive, SparsitySchedule, SparsitySteps, pq_index
from tests.support.pq import bound, index, sparsity_after


def drawn(count: int, seed: int, spread: float = 1.0) -> list[float]:
    generator = random.Random(seed)
    return [generator.gauss(0, 1) * math.exp(spread * generator.gauss(0, 1)) for _ in range(count)]


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.2, 3.5)])
def test_the_index_is_that_of_plain_loops(p: float, q: float) -> None:
    for seed, count in enumerate((1, 2, 7, 100)):
        values = drawn(count, seed)
        found = pq_index(torch.tensor(values, dtype=torch.float64).view(1, -1), p, q)
        assert found == pytest.approx(index(values, p, q), abs=1e-12)
        scaled = pq_index(-1e-200 * torch.tensor(values, dtype=torch.float64), p, q)
        assert scaled == pytest.approx(found, abs=1e-12), "the scale does not matter, however small"


def test_the_index_by_hand() -> None:
    assert pq_index(torch.tensor([4.0, 1.0])) == pytest.approx(1 - 9 / 2 / 5)  # (2 + 1)^2 / 5, times 2^(1 - 2)
    assert pq_index(torch.tensor([3.0, 4.0]), 1, 2) == pytest.approx(1 - 7 / 5 / math.sqrt(2))
    assert pq_index(torch.full((5, 3), -0.3)) == pytest.approx(0, abs=1e-12)
    assert pq_index(torch.zeros(4)) == 0
    alone = torch.zeros(100)
    alone[3] = -2
    assert pq_index(alone) == pytest.approx(0.99)
    assert pq_index(torch.cat([alone, torch.zeros(10**6)]), 0.01, 1) == 1  # no power leaves the range of floats


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_the_bound_holds(spread: float) -> None:
    """Theorem 2: for every ``r``, with the ``eta`` that the ``r`` largest have."""
    for seed, (p, q) in enumerate([(0.5, 1.0), (1.0, 2.0), (0.3, 0.6)]):
        values = sorted((abs(value) for value in drawn(40, seed, spread)), reverse=True)
        for kept in range(1, 41):
            lost = sum(value**p for value in values[kept:]) / sum(value**p for value in values[:kept])
            assert kept >= bound(values, p, q, lost) - 1e-9
        assert bound(values, p, q, 0) >= 1


@pytest.mark.parametrize(
    "settings",
    [{}, {"p": 1.0, "q": 2.0}, {"eta": 0.2}, {"gamma": 1.7}, {"gamma": 0.4}, {"beta": 0.05}, {"max_sparsity": 0.42}],
    ids=str,
)
def test_sparsities_are_those_of_plain_loops(settings: dict[str, float]) -> None:
    schedule = PQAdaptive(0, 3, **settings)  # type: ignore[arg-type]
    values, mask = drawn(90, 5), [True] * 70 + [False] * 20
    weights = {"a": torch.tensor(values[:30]).double().view(5, 6), "b": torch.tensor(values[30:]).double()}
    masks = {"a": torch.tensor(mask[:30]).view(5, 6), "b": torch.tensor(mask[30:])}
    found = schedule.adapted(schedule.max_sparsity, weights, masks)
    assert found == sparsity_after(values[:70], 90, settings)
    assert found is not None
    assert 20 / 90 < found <= schedule.max_sparsity


def test_nothing_is_found_where_weights_are_alike_or_the_most_is_reached() -> None:
    schedule, kept = PQAdaptive(0, 3, max_sparsity=0.3), torch.ones(10, dtype=torch.bool)
    assert schedule.adapted(0.3, {"a": -torch.ones(10)}, {"a": kept}) is None
    kept[:3] = False
    assert schedule.adapted(0.3, {"a": torch.arange(10.0)}, {"a": kept}) is None
    assert schedule.adapted(0.4, {"a": torch.arange(10.0) ** 4}, {"a": kept}) == 0.4
    assert schedule.adapted(0.3, {"a": torch.zeros(10)}, {"a": torch.zeros(10, dtype=torch.bool)}) is None


def test_events_are_those_of_the_epochs() -> None:
    schedule = PQAdaptive(2, 7, frequency=2, max_sparsity=0.8)
    assert schedule.adapts
    assert not schedule.regrows
    assert schedule.events(None) == {2: 0.8, 4: 0.8, 6: 0.8}
    with pytest.raises(ScheduleError, match="max_epochs=6"):
        schedule.events(6)
    plain = SparsitySteps({0: 0.5})
    assert not plain.adapts
    assert plain.adapted(0.5, {}, {}) == 0.5


def test_it_comes_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=SparsitySchedule)
    given = {"start_epoch": 1, "end_epoch": 9, "gamma": 1.2}
    text = yaml.safe_dump({"schedule": {"class_path": "lightning_cap.schedules.PQAdaptive", "init_args": given}})
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)
    assert instantiate(parser.parse_string(text)).schedule == PQAdaptive(1, 9, gamma=1.2)


def test_weights_that_are_not_finite_are_refused() -> None:
    weights, kept = torch.tensor([1.0, float("nan")]), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ConfigError, match="not finite"):
        pq_index(weights)
    with pytest.raises(ConfigError, match="not finite"):
        PQAdaptive(0, 1).adapted(0.9, {"a": weights}, {"a": kept})
