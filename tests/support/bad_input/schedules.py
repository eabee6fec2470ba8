"""Bad input to sparsity schedules."""

from __future__ import annotations

from lightning_cap.errors import ScheduleError
from lightning_cap.schedules import OneShot
from tests.support.bad_input.table import NO_NUMBERS, wrong

LINES = [
    *wrong(OneShot, "sparsity", *NO_NUMBERS, 1.0, -0.1, 50, error=ScheduleError),
]
