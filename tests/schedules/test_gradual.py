from __future__ import annotations

import dataclasses

import numpy as np
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
    check_events,
)


def test_steps_come_in_order() -> None:
    events = SparsitySteps({40: 0.6, 0: 0.4, 20: 0.5}).events(41)
    assert list(events.items()) == [(0, 0.4), (20, 0.5), (40, 0.6)]
    assert SparsitySteps({3: 0.5}).events(None) == {3: 0.5}


def test_steps_keep_a_copy_of_their_own() -> None:
    steps = {0: 0.4}
    schedule = SparsitySteps(steps)
    steps[1] = 0.9
    schedule.events(5)[2] = 0.9
    assert schedule.events(5) == {0: 0.4}
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.steps = {}  # type: ignore[misc]


def test_steps_take_string_keys() -> None:
    assert SparsitySteps({"20": 0.5, "3": 0.25}).events(21) == {3: 0.25, 20: 0.5}  # type: ignore[dict-item]


@pytest.mark.parametrize("key", ["a", "1.5", "-1", "", 1.5, -1, True, None])
def test_steps_refuse_bad_epochs(key: object) -> None:
    with pytest.raises(ScheduleError, match=r"^epoch=.*: give a whole number of at least 0, such as 20\."):
        SparsitySteps({key: 0.5})  # type: ignore[dict-item]


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan"), "0.5", None, True])
def test_sparsity_outside_the_range_is_refused(sparsity: object) -> None:
    for make in (
        lambda: SparsitySteps({3: sparsity}),  # type: ignore[dict-item]
        lambda: OneShot(sparsity),  # type: ignore[arg-type]
        lambda: PolynomialSchedule(sparsity, 0, 4),  # type: ignore[arg-type]
        lambda: PolynomialSchedule(0.9, 0, 4, initial=sparsity),  # type: ignore[arg-type]
    ):
        with pytest.raises(ScheduleError, match=r"=.*: give a number in \[0, 1\), such as 0\.5\."):
            make()


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({}, r"steps=\{\}: give the sparsity"),
        ({"1": 0.5, 1: 0.5}, "twice"),
        ([0.5], r"steps=\[0\.5\]: give the sparsity"),
    ],
)
def test_steps_refuse_malformed_mappings(steps: object, words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        SparsitySteps(steps)  # type: ignore[arg-type]


def test_decrease_must_be_declared() -> None:
    with pytest.raises(ScheduleError, match=r"from sparsity 0\.6 at epoch 2 to 0\.5 at epoch 7.*allow_decrease=True"):
        SparsitySteps({0: 0.1, 2: 0.6, 7: 0.5})
    assert SparsitySteps({2: 0.6, 7: 0.0}, allow_decrease=True).events(8) == {2: 0.6, 7: 0.0}
    assert SparsitySteps({2: 0.6, 7: 0.6}).events(8) == {2: 0.6, 7: 0.6}


@pytest.mark.parametrize(
    "schedule", [SparsitySteps({0: 0.1, 10: 0.5}), PolynomialSchedule(0.5, 0, 10), OneShot(0.5, 10)]
)
def test_events_must_lie_before_the_end(schedule: SparsitySchedule) -> None:
    assert max(schedule.events(11)) == 10
    with pytest.raises(ScheduleError, match=r"epoch 10, .*max_epochs=10 the last epoch is 9"):
        schedule.events(10)


def test_cubic_polynomial() -> None:
    events = PolynomialSchedule(final=0.9, start_epoch=2, end_epoch=12, initial=0.3, frequency=4).events(20)
    assert list(events) == [2, 6, 10, 12]  # the end is always there
    assert events[2] == 0.3
    assert events[6] == pytest.approx(0.9 - 0.6 * 0.6**3)
    assert events[10] == pytest.approx(0.9 - 0.6 * 0.2**3)
    assert events[12] == 0.9


def test_linear_polynomial_leaves_the_empty_start_out() -> None:
    events = PolynomialSchedule(final=0.8, start_epoch=1, end_epoch=5, power=1).events(None)
    assert events == pytest.approx({2: 0.2, 3: 0.4, 4: 0.6, 5: 0.8})


def test_polynomial_with_a_frequency_beyond_the_end() -> None:
    assert PolynomialSchedule(0.5, 0, 3, frequency=9).events(4) == {3: 0.5}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"end_epoch": 2}, "end_epoch=2: it is not after start_epoch=2"),
        ({"start_epoch": -1}, "start_epoch=-1: give a whole number"),
        ({"start_epoch": "1"}, "start_epoch='1': give a whole number"),
        ({"end_epoch": 4.0}, r"end_epoch=4\.0: give a whole number"),
        ({"initial": 0.95}, r"not below initial=0\.95"),
        ({"final": 0.0}, "must be above 0"),
        ({"frequency": 0}, "frequency=0"),
        ({"frequency": 1.5}, r"frequency=1\.5"),
        ({"power": 0}, "power=0"),
        ({"power": float("nan")}, "power=nan"),
    ],
)
def test_polynomial_refuses(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        PolynomialSchedule(**{"final": 0.9, "start_epoch": 2, "end_epoch": 8, **arguments})  # type: ignore[arg-type]


def test_one_shot() -> None:
    assert OneShot(0.75).events(10) == {0: 0.75}
    assert OneShot(0.75, epoch=9).events(10) == {9: 0.75}
    assert OneShot(0.75, epoch=None).events(10) == {10: 0.75}
    with pytest.raises(ScheduleError, match=r"epoch=None prunes at the end of training.*give the Trainer max_epochs"):
        OneShot(0.75, epoch=None).events(None)
    with pytest.raises(ScheduleError, match="epoch=-3: give a whole number"):
        OneShot(0.75, epoch=-3)


def test_check_events_serves_schedules_of_others() -> None:
    @dataclasses.dataclass(frozen=True)
    class Late(SparsitySchedule):
        def events(self, max_epochs: int | None) -> dict[int, float]:
            return check_events({7: 0.5}, max_epochs)

    assert Late().events(8) == {7: 0.5}
    with pytest.raises(ScheduleError, match="last epoch is 6"):
        Late().events(7)


@pytest.mark.parametrize(
    ("text", "events"),
    [
        (
            "{class_path: lightning_cap.schedules.SparsitySteps, init_args: {steps: {0: 0.4, '2': 0.5}}}",
            {0: 0.4, 2: 0.5},
        ),
        (
            "{class_path: lightning_cap.schedules.PolynomialSchedule, "
            "init_args: {final: 0.8, start_epoch: 0, end_epoch: 2, power: 1}}",
            {1: 0.4, 2: 0.8},
        ),
        ("{class_path: lightning_cap.schedules.OneShot, init_args: {sparsity: 0.5, epoch: null}}", {3: 0.5}),
    ],
)
def test_instantiates_from_yaml(text: str, events: dict[int, float]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=SparsitySchedule)
    config = parser.parse_object({"schedule": yaml.safe_load(text)})
    again = parser.parse_object(config.as_dict())  # as a saved config is read back
    for cfg in (config, again):
        instantiate = getattr(parser, "instantiate", parser.instantiate_classes)
        assert instantiate(cfg).schedule.events(3) == pytest.approx(events)


def parsed(*arguments: str) -> SparsitySchedule:
    """The schedule that a command line makes, as jsonargparse reads it."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=SparsitySchedule)
    config = parser.parse_args(["--schedule=SparsitySteps", *arguments])
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)
    schedule = instantiate(config).schedule
    assert instantiate(parser.parse_string(parser.dump(config))).schedule == schedule  # as a saved config is read back
    assert isinstance(schedule, SparsitySchedule)
    return schedule


@pytest.mark.parametrize(
    "steps", ["{0.5: 0.5}", "{0.1: 0.5, 0.2: 0.6}", "{true: 0.5}", "{1.0: 0.5}", "{a: 0.5}", "{null: 0.5}"]
)
def test_yaml_cuts_no_epoch_to_a_whole_number(steps: str) -> None:
    with pytest.raises(ValueError, match="epoch=") as caught:
        parsed(f"--schedule.steps={steps}")
    assert "epoch=" in str(caught.value.__cause__ or caught.value)


@pytest.mark.parametrize("steps", ["{0: true}", "{1: 0.5, 0: null}", "{0: [0.5]}", "{0: 1.5}", "{0: much}"])
def test_yaml_makes_no_sparsity_of_what_is_none(steps: str) -> None:
    with pytest.raises(ValueError, match="sparsity of epoch 0="):
        parsed(f"--schedule.steps={steps}")


def test_command_lines_override_single_epochs() -> None:
    assert parsed("--schedule.steps={0: 0.5, '3': 0.75}").events(4) == {0: 0.5, 3: 0.75}
    overridden = parsed("--schedule.steps={0: 0.5, 3: 0.75}", "--schedule.steps.0=0.4", "--schedule.steps.2=0.6")
    assert overridden.events(4) == {0: 0.4, 2: 0.6, 3: 0.75}


def test_sparsities_are_the_decimals_that_were_written() -> None:
    assert SparsitySteps({np.int64(1): np.float32(0.3)}).events(2) == {1: 0.3}
    assert OneShot(np.float32(0.3), epoch=None).events(2) == {2: 0.3}


def test_a_schedule_of_a_million_events_is_refused_at_once() -> None:
    for make in (
        lambda: PolynomialSchedule(0.5, 0, 10**12),
        lambda: ExponentialSchedule(0.5, 0, 10**12, frequency=10),
        lambda: RepeatedSchedule(0.5).events(10**12),
        lambda: AlternatingSchedule(0.5, 0, 1, 1).events(10**12),
    ):
        with pytest.raises(ScheduleError, match="more than 1000000 events"):
            make()
