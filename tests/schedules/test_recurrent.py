"""Exponential, alternating and repeated schedules."""

from __future__ import annotations

from itertools import pairwise

import pytest
import yaml
from jsonargparse import ArgumentParser

from lightning_cap.errors import ScheduleError
from lightning_cap.schedules import (
    AlternatingSchedule,
    ExponentialSchedule,
    OneShot,
    PolynomialSchedule,
    RepeatedSchedule,
    SparsitySchedule,
    SparsitySteps,
)


def test_density_falls_by_the_same_factor() -> None:
    events = ExponentialSchedule(final=0.99, start_epoch=2, end_epoch=10, initial=0.19, frequency=2).events(20)
    assert list(events) == [2, 4, 6, 8, 10]
    density = [1 - sparsity for sparsity in events.values()]
    assert density == pytest.approx([0.81 * (0.01 / 0.81) ** (i / 4) for i in range(5)])
    assert (events[2], events[10]) == (0.19, 0.99)


def test_exponential_leaves_the_empty_start_out_and_ends_at_the_end() -> None:
    assert ExponentialSchedule(0.75, 0, 2).events(3) == pytest.approx({1: 0.5, 2: 0.75})
    assert ExponentialSchedule(0.75, 0, 3, frequency=2).events(4) == pytest.approx({2: 1 - 0.25 ** (2 / 3), 3: 0.75})
    assert ExponentialSchedule(0.5, 1, 9, frequency=50).events(None) == {9: 0.5}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"end_epoch": 2}, "end_epoch=2: it is not after start_epoch=2"),
        ({"initial": 0.95}, r"not below initial=0\.95"),
        ({"final": 0.0}, "must be above 0"),
        ({"final": 1.0}, r"final=1\.0: give a number in"),
        ({"frequency": 0}, "frequency=0"),
        ({"start_epoch": -1}, "start_epoch=-1: give a whole number"),
    ],
)
def test_exponential_refuses(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        ExponentialSchedule(**{"final": 0.9, "start_epoch": 2, "end_epoch": 8, **arguments})  # type: ignore[arg-type]


def test_phases_alternate_and_the_last_one_is_sparse() -> None:
    schedule = AlternatingSchedule(0.9, start_epoch=10, sparse_epochs=5, dense_epochs=3, end_epoch=30)
    assert schedule.events(100) == {10: 0.9, 15: 0.0, 18: 0.9, 23: 0.0, 26: 0.9}
    assert list(schedule.events(100)) == [10, 15, 18, 23, 26]  # 34 would be after the end
    assert AlternatingSchedule(0.9, 10, 5, 3, end_epoch=26).events(27)[26] == 0.9


def test_the_last_dense_phase_may_be_longer() -> None:
    """Appendix L: 7 sparse phases from epoch 150 on and 6 dense ones, of 25 epochs; 50 dense epochs, then 75 sparse ones."""
    events = AlternatingSchedule(0.75, 150, 25, 25, end_epoch=525, last_dense_epochs=50).events(600)
    starts = [*events, 600]
    lengths = [after - before for before, after in pairwise(starts)]
    assert lengths == [25] * 13 + [50, 75]
    assert list(events.values()) == [0.75, 0.0] * 7 + [0.75]
    with pytest.raises(ScheduleError, match="second sparse phase would begin at epoch 225"):
        AlternatingSchedule(0.75, 150, 25, 25, end_epoch=224, last_dense_epochs=50)


def test_phases_end_a_sparse_phase_before_the_run_does() -> None:
    schedule = AlternatingSchedule(0.5, 1, 2, 1)
    assert schedule.events(9) == {1: 0.5, 3: 0.0, 4: 0.5, 6: 0.0, 7: 0.5}
    assert schedule.events(8) == {1: 0.5, 3: 0.0, 4: 0.5}
    with pytest.raises(ScheduleError, match=r"second sparse phase would begin at epoch 4, after epoch 3.*OneShot"):
        schedule.events(5)
    with pytest.raises(ScheduleError, match=r"end_epoch=None.*give AlternatingSchedule an end_epoch"):
        schedule.events(None)
    assert list(AlternatingSchedule(0.5, 1, 2, 1, end_epoch=4).events(None)) == [1, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparsity": 0.0}, r"sparsity=0\.0: the sparse phases would be dense"),
        ({"sparsity": 1.0}, r"sparsity=1\.0: give a number in"),
        ({"start_epoch": -1}, "start_epoch=-1: give a whole number"),
        ({"sparse_epochs": 0}, "sparse_epochs=0: give a whole number"),
        ({"dense_epochs": 1.5}, r"dense_epochs=1\.5: give a whole number"),
        ({"end_epoch": 5}, "second sparse phase would begin at epoch 6, after epoch 5"),
        ({"end_epoch": -5}, "end_epoch=-5: give a whole number"),
    ],
)
def test_alternation_refuses(arguments: dict[str, float], words: str) -> None:
    good = {"sparsity": 0.9, "start_epoch": 2, "sparse_epochs": 3, "dense_epochs": 1}
    with pytest.raises(ScheduleError, match=words):
        AlternatingSchedule(**{**good, **arguments})  # type: ignore[arg-type]


def test_alternation_beyond_the_last_epoch_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"epoch 26, but with max_epochs=26"):
        AlternatingSchedule(0.9, 10, 5, 3, end_epoch=26).events(26)


def test_repeated() -> None:
    assert RepeatedSchedule(0.9, frequency=2).events(8) == dict.fromkeys([0, 2, 4, 6], 0.9)
    assert RepeatedSchedule(0.9, frequency=2, start_epoch=1, end_epoch=4).events(None) == dict.fromkeys([1, 3], 0.9)
    assert RepeatedSchedule(0.9).events(1) == {0: 0.9}
    assert RepeatedSchedule(0.9, start_epoch=9).events(10) == {9: 0.9}  # three quarters are over by then
    with pytest.raises(ScheduleError, match="end_epoch=None is three quarters"):
        RepeatedSchedule(0.9).events(None)
    with pytest.raises(ScheduleError, match="end_epoch=2: it is before start_epoch=3"):
        RepeatedSchedule(0.9, start_epoch=3, end_epoch=2)
    for wrong in ({"sparsity": 1.0}, {"frequency": 0}, {"start_epoch": -1}, {"end_epoch": 1.5}):
        with pytest.raises(ScheduleError):
            RepeatedSchedule(**{"sparsity": 0.9, **wrong})  # type: ignore[arg-type]


def test_who_declares_regrowth() -> None:
    assert AlternatingSchedule(0.9, 0, 1, 1).regrows
    assert SparsitySteps({0: 0.5}, allow_decrease=True).regrows
    rising = [SparsitySteps({0: 0.5}), PolynomialSchedule(0.5, 0, 2), ExponentialSchedule(0.5, 0, 2), OneShot(0.5)]
    assert not any(schedule.regrows for schedule in [*rising, RepeatedSchedule(0.5)])


@pytest.mark.parametrize(
    ("name", "arguments", "events"),
    [
        ("ExponentialSchedule", {"final": 0.75, "start_epoch": 0, "end_epoch": 2}, {1: 0.5, 2: 0.75}),
        (
            "AlternatingSchedule",
            {"sparsity": 0.5, "start_epoch": 0, "sparse_epochs": 1, "dense_epochs": 1, "end_epoch": None},
            {0: 0.5, 1: 0.0, 2: 0.5},
        ),
        ("RepeatedSchedule", {"sparsity": 0.5, "frequency": 2}, {0: 0.5, 2: 0.5}),
    ],
)
def test_instantiates_from_yaml(name: str, arguments: dict[str, float], events: dict[int, float]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=SparsitySchedule)
    text = yaml.safe_dump({"class_path": f"lightning_cap.schedules.{name}", "init_args": arguments})
    config = parser.parse_object({"schedule": yaml.safe_load(text)})
    assert config.schedule.class_path == f"lightning_cap.schedules.{name}"
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)
    for cfg in (config, parser.parse_object(config.as_dict())):
        assert instantiate(cfg).schedule.events(3) == pytest.approx(events)
