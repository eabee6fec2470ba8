from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_cap.callbacks.run import cycle_starts, writes_files
from lightning_cap.pruners import Magnitude
from tests.support.regrowing import rigl


def test_cycles_begin_where_the_goal_changes() -> None:
    events = {0: 0.5, 1: 0.5, 2: 0.75, 3: 0.75, 4: 0.5}
    assert cycle_starts(events, rigl()) == [0, 2, 4]
    assert cycle_starts(events, Magnitude()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("trainer", "writes"), [({}, True), ({"plans": True}, False), ({"fast_dev_run": True}, False)])
def test_neither_a_try_nor_a_plan_writes(trainer: dict[str, Any], writes: bool) -> None:
    assert writes_files(SimpleNamespace(**trainer)) is writes  # type: ignore[arg-type]
