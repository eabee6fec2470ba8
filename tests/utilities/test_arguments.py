from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_cap.errors import ConfigError, ScheduleError
from lightning_cap.utilities.arguments import (
    require_choice,
    require_counts,
    require_flag,
    require_instance,
    require_names,
    require_path,
    require_real,
    require_text,
    require_whole,
    shown,
)

NO_NUMBERS: list[Any] = ["3", None, True, [3], {}, float("nan"), float("inf"), 1j, torch.ones(2), object(), int]


@pytest.mark.parametrize("value", [*NO_NUMBERS, 3.0, 0, -1])
def test_a_whole_number_is_one(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^count=.*: give a whole number of at least 1, such as 128\.$"):
        require_whole("count", value, example=128)
    require_whole("count", np.int64(3))


def test_a_range_of_whole_numbers() -> None:
    require_whole("shift", 7, 0, 7)
    with pytest.raises(ScheduleError, match=r"shift=8: give a whole number from 0 to 7\."):
        require_whole("shift", 8, 0, 7, error=ScheduleError)
    with pytest.raises(ConfigError, match=r"^b=True"):
        require_counts(a=1, b=True)


@pytest.mark.parametrize("value", [*NO_NUMBERS, -0.1, 1, 1.5, pytest.param(10**400, id="huge")])
def test_a_real_number_is_in_its_interval(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^sparsity=.*: give a number in \[0, 1\), such as 0\.75\.$"):
        require_real("sparsity", value, "[0, 1)", 0.75)


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        ("[0, 1)", [0, 0.5, np.float32(0.5)], [1], r"in \[0, 1\)"),
        ("(0, 1]", [1, 0.5], [0], r"in \(0, 1\]"),
        ("(0, inf)", [1e300, 5e-324], [0], "above 0"),
        ("[0, inf)", [0], [-5e-324], "of at least 0"),
    ],
)
def test_intervals(interval: str, inside: list[Any], outside: list[Any], words: str) -> None:
    for value in inside:
        require_real("x", value, interval)
    for value in outside:
        with pytest.raises(ConfigError, match=words):
            require_real("x", value, interval)


@pytest.mark.parametrize("value", [None, 3, ["a"], "c", True, ""])
def test_one_of_some_strings(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"mode=.*: choose 'a', 'b' or 'd'\."):
        require_choice("mode", value, ("a", "b", "d"))
    require_choice("mode", "d", ("a", "b", "d"))


@pytest.mark.parametrize("value", [None, 0, 1, "yes", []])
def test_a_flag_is_true_or_false(value: Any) -> None:
    with pytest.raises(ConfigError, match="give True or False"):
        require_flag("evaluate", value)
    require_flag("evaluate", False)


@pytest.mark.parametrize("value", [None, 3, "", " ", ["a"]])
def test_a_text_has_something_in_it(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"such as 'val/acc'\.$"):
        require_text("monitor", value, "val/acc")
    with pytest.raises(ConfigError, match=r"such as 'out'"):
        require_path("folder", value, "out")
    require_text("monitor", None, "val/acc", optional=True)
    require_path("folder", Path("x"), "out")


def test_an_instance_is_no_class_and_no_other_object() -> None:
    with pytest.raises(ConfigError, match=r"pattern=int: this is a class\. Give an instance of it, int\(\.\.\.\)"):
        require_instance("pattern", int, int, "3")
    with pytest.raises(ConfigError, match=r"pattern='x': give an int, such as 3\."):
        require_instance("pattern", "x", int, "3")
    with pytest.raises(ConfigError, match="give a str or float"):
        require_instance("pattern", None, (str, float), "3")
    require_instance("pattern", None, int, "3", optional=True)


@pytest.mark.parametrize("value", ["*.fc?.weight", 3, [3], [""], {"a": 1}, ["a", None]])
def test_names_are_a_list_of_strings(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"include=.*such as include=\['"):
        require_names("include", value)
    require_names("include", None)
    require_names("include", ["a"])
    require_names("include", ())


def test_a_large_value_is_shown_in_one_short_line() -> None:
    assert len(shown("x" * 10**6)) < 200
    assert "\n" not in shown(torch.ones(100, 100))
    assert len(shown(torch.ones(100, 100))) < 200
    assert shown(0.3) == "0.3"
