"""Bad input to sparsity schedules; what YAML makes of it is in `tests/schedules`."""

from __future__ import annotations

from typing import Any

import torch

from lightning_cap.errors import ScheduleError
from lightning_cap.schedules import (
    AlternatingSchedule,
    ExponentialSchedule,
    OneShot,
    PolynomialSchedule,
    PQAdaptive,
    RepeatedSchedule,
    SparsitySchedule,
    SparsitySteps,
    check_events,
    pq_index,
)
from tests.support.bad_input.table import NO_COUNTS, NO_NUMBERS, Line, wrong

RISE: dict[str, Any] = {"final": 0.9, "start_epoch": 2, "end_epoch": 8}
ALTERNATING: dict[str, Any] = {"sparsity": 0.5, "start_epoch": 2, "sparse_epochs": 3, "dense_epochs": 1}
NO_SPARSITIES: tuple[Any, ...] = (*NO_NUMBERS, 1.0, -0.1, 50)
NO_EPOCHS: tuple[Any, ...] = ("3", None, True, [3], float("nan"), 3.0, 2.5, -1)
PQ: dict[str, Any] = {"start_epoch": 2, "end_epoch": 8}
FOUND: dict[str, Any] = {
    "planned": 0.5,
    "weights": {"a": torch.ones(2)},
    "masks": {"a": torch.ones(2, dtype=torch.bool)},
}
NO_FLAGS: tuple[Any, ...] = ("yes", None, 1, 0.0, [])
GOOD: list[SparsitySchedule] = [
    SparsitySteps({1: 0.5}), PolynomialSchedule(0.5, 0, 2), ExponentialSchedule(0.5, 0, 2), OneShot(0.5, None),
    OneShot(0.5), RepeatedSchedule(0.5), AlternatingSchedule(0.5, 0, 1, 1), PQAdaptive(0, 2),
]  # fmt: skip


def steps(given: Any, *words: str) -> Line:
    """A line of `SparsitySteps` whose message names what is wrong inside of the mapping."""
    return Line(f"SparsitySteps({given!r})", lambda _: SparsitySteps(given), ScheduleError, words)


LINES = [
    *wrong(OneShot, "sparsity", *NO_SPARSITIES, error=ScheduleError),
    *wrong(OneShot, "epoch", *(e for e in NO_EPOCHS if e is not None), error=ScheduleError, given={"sparsity": 0.5}),
    *wrong(
        SparsitySteps, "steps", {}, [0.5], None, 0.5, "0: 0.5", OneShot, {0}, error=ScheduleError, words=["{0: 0.5"]
    ),
    *wrong(SparsitySteps, "allow_decrease", *NO_FLAGS, given={"steps": {0: 0.5}}),
    *(
        steps({epoch: 0.5}, f"epoch={epoch!r}: give a whole number")
        for epoch in ("a", "1.5", "-1", "", 1.5, -1, True, None, 1.0)
    ),
    *(steps({3: sparsity}, "sparsity of epoch 3=", "[0, 1)") for sparsity in NO_SPARSITIES),
    steps({"1": 0.5, 1: 0.5}, "epoch=1", "twice"),
    steps({0: 0.5, 1: 0.4}, "allow_decrease=True"),
    *wrong(check_events, "events", {}, None, [(0, 0.5)], error=ScheduleError, given={"max_epochs": 3}),
    *wrong(check_events, "max_epochs", "3", True, 3.0, -1, error=ScheduleError, given={"events": {0: 0.5}}),
    *(
        Line(
            f"{schedule!r}.events({m!r})", lambda _, s=schedule, m=m: s.events(m), ScheduleError, (f"max_epochs={m!r}",)
        )
        for schedule in GOOD
        for m in ("3", True, 3.0, -1, [3])
    ),
    *wrong(PolynomialSchedule, "final", *NO_SPARSITIES, error=ScheduleError, given=RISE),
    *wrong(PolynomialSchedule, "initial", "0", None, True, 0.95, float("nan"), error=ScheduleError, given=RISE),
    *wrong(PolynomialSchedule, "start_epoch", *NO_EPOCHS, 8, error=ScheduleError, given=RISE),
    *wrong(PolynomialSchedule, "end_epoch", *NO_EPOCHS, 2, error=ScheduleError, given=RISE),
    *wrong(PolynomialSchedule, "frequency", *NO_COUNTS, error=ScheduleError, given=RISE),
    *wrong(PolynomialSchedule, "power", *NO_NUMBERS, 0, -1.0, error=ScheduleError, given=RISE),
    *wrong(ExponentialSchedule, "final", "0.5", None, True, 0.0, 1.0, float("inf"), error=ScheduleError, given=RISE),
    *wrong(ExponentialSchedule, "initial", "0", None, 0.95, error=ScheduleError, given=RISE),
    *wrong(ExponentialSchedule, "end_epoch", "8", None, 8.0, error=ScheduleError, given=RISE),
    *wrong(ExponentialSchedule, "frequency", "1", None, True, 1.0, 0, error=ScheduleError, given=RISE),
    *wrong(AlternatingSchedule, "sparsity", *NO_SPARSITIES, 0.0, error=ScheduleError, given=ALTERNATING),
    *wrong(AlternatingSchedule, "start_epoch", *NO_EPOCHS, error=ScheduleError, given=ALTERNATING),
    *wrong(AlternatingSchedule, "sparse_epochs", "3", None, True, 3.0, 0, error=ScheduleError, given=ALTERNATING),
    *wrong(AlternatingSchedule, "dense_epochs", "3", None, True, 1.5, 0, error=ScheduleError, given=ALTERNATING),
    *wrong(AlternatingSchedule, "last_dense_epochs", "3", True, 1.5, 0, error=ScheduleError, given=ALTERNATING),
    *wrong(AlternatingSchedule, "end_epoch", "9", True, 9.0, -5, 3, error=ScheduleError, given=ALTERNATING),
    *wrong(RepeatedSchedule, "sparsity", "0.5", None, True, 1.0, error=ScheduleError),
    *wrong(RepeatedSchedule, "frequency", *NO_COUNTS, error=ScheduleError, given={"sparsity": 0.5}),
    *wrong(RepeatedSchedule, "start_epoch", "0", None, 0.0, -1, error=ScheduleError, given={"sparsity": 0.5}),
    *wrong(RepeatedSchedule, "end_epoch", "9", True, 9.0, -1, error=ScheduleError, given={"sparsity": 0.5}),
    *wrong(PQAdaptive, "start_epoch", *NO_EPOCHS, 9, error=ScheduleError, given=PQ),
    *wrong(PQAdaptive, "end_epoch", *NO_EPOCHS, 1, error=ScheduleError, given=PQ),
    *wrong(PQAdaptive, "frequency", *NO_COUNTS, error=ScheduleError, given=PQ),
    *wrong(PQAdaptive, "max_sparsity", *NO_SPARSITIES, 0, error=ScheduleError, given=PQ),
    *wrong(PQAdaptive, "p", *NO_NUMBERS, 0, -0.5, error=ScheduleError, given=PQ),
    *wrong(PQAdaptive, "q", *NO_NUMBERS, 0, 0.5, 0.2, error=ScheduleError, given=PQ),
    *wrong(PQAdaptive, "eta", *NO_NUMBERS, -0.1, error=ScheduleError, given=PQ),
    *wrong(PQAdaptive, "gamma", *NO_NUMBERS, 0, -1.0, error=ScheduleError, given=PQ),
    *wrong(PQAdaptive, "beta", *NO_NUMBERS, 0, 1.0, error=ScheduleError, given=PQ),
    *wrong(PQAdaptive(0, 2).adapted, "planned", *NO_SPARSITIES, error=ScheduleError, given=FOUND),
    *wrong(PQAdaptive(0, 2).adapted, "weights", None, 3, [torch.ones(2)], error=ScheduleError, given=FOUND),
    *wrong(
        PQAdaptive(0, 2).adapted,
        "masks",
        None,
        3,
        {},
        {"a": None},
        {"a": torch.ones(2)},
        {"a": torch.ones(3, dtype=torch.bool)},
        error=ScheduleError,
        given=FOUND,
    ),
    *wrong(pq_index, "weights", None, 3, [1.0], torch.ones(0), torch.ones(2, dtype=torch.complex64)),
    *wrong(pq_index, "p", *NO_NUMBERS, 0, 1.0, given={"weights": torch.ones(2)}),
    *wrong(pq_index, "q", *NO_NUMBERS, 0, 0.5, given={"weights": torch.ones(2)}),
]
