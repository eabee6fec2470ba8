"""Settings as YAML and the command line give them: taken as they are written, or refused; never cut or turned into another."""

from __future__ import annotations

import inspect
import typing
from argparse import ArgumentError
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_cap import pruners, schedules
from lightning_cap.errors import CAPError
from lightning_cap.pruners import Pruner
from lightning_cap.schedules import SparsitySchedule

GIVEN: dict[str, dict[str, Any]] = {
    "PQAdaptive": {"start_epoch": 0, "end_epoch": 40},
    "PolynomialSchedule": {"final": 0.5, "start_epoch": 0, "end_epoch": 40},
    "ExponentialSchedule": {"final": 0.5, "start_epoch": 0, "end_epoch": 40},
    "OneShot": {"sparsity": 0.5},
    "AlternatingSchedule": {"sparsity": 0.5, "start_epoch": 0, "sparse_epochs": 1, "dense_epochs": 1},
    "RepeatedSchedule": {"sparsity": 0.5},
}


def parsed(kind: type[Any], **settings: Any) -> Any:
    """What jsonargparse makes of the class with these settings, as from a file."""
    base = Pruner if issubclass(kind, Pruner) else SparsitySchedule
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--made", type=base)
    given = {**GIVEN.get(kind.__name__, {}), **settings}
    config = parser.parse_object({"made": {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": given}})
    return getattr(parser, "instantiate", parser.instantiate_classes)(config).made


def settings_of(wanted: type[Any]) -> list[tuple[type[Any], str]]:
    """Every setting of a pruner or a schedule that is of a type, or None."""
    found = []
    for module, base in ((pruners, Pruner), (schedules, SparsitySchedule)):
        for kind in vars(module).values():
            if not isinstance(kind, type) or not issubclass(kind, base) or inspect.isabstract(kind):
                continue
            hints = typing.get_type_hints(kind)
            names = [name for name in inspect.signature(kind).parameters if hints[name] in (wanted, wanted | None)]
            found += [(kind, name) for name in names]
    return found


INTS, FLOATS, BOOLS = settings_of(int), settings_of(float), settings_of(bool)


def test_there_are_settings_to_try() -> None:
    assert min(len(INTS), len(FLOATS)) >= 15
    assert {kind.__name__ for kind, _ in BOOLS} == {"CAP", "CAPUnits", "WoodFisher", "SparsitySteps"}


@pytest.mark.parametrize(("kind", "name"), INTS, ids=str)
def test_whole_numbers(kind: type[Any], name: str) -> None:
    assert getattr(parsed(kind, **{name: 7}), name) == 7
    for wrong in (7.5, 7.0, True, "many", [7], {"a": 7}, float("nan")):
        with pytest.raises((CAPError, ArgumentError, TypeError)) as caught:
            parsed(kind, **{name: wrong})
        assert name in str(caught.value)


@pytest.mark.parametrize(("kind", "name"), FLOATS, ids=str)
def test_real_numbers(kind: type[Any], name: str) -> None:
    for wrong in (True, "much", [0.5], None, float("nan"), float("inf")):
        with pytest.raises((CAPError, ArgumentError, TypeError)) as caught:
            parsed(kind, **{name: wrong})
        assert name in str(caught.value)


@pytest.mark.parametrize(("kind", "name"), BOOLS, ids=str)
def test_flags(kind: type[Any], name: str) -> None:
    for wrong in (1, 0.0, "maybe", None, [True]):
        with pytest.raises((CAPError, ArgumentError, TypeError)):
            parsed(kind, **{name: wrong}, **({"steps": {0: 0.5}} if name == "allow_decrease" else {}))
