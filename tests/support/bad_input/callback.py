"""Bad input to `CAPPruningCallback`. What depends on the Trainer is in `tests/callbacks/test_checks.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from lightning_cap import CAPPruningCallback, PDPCallback
from lightning_cap.errors import ConfigError, PatternError, ScheduleError, UnsupportedError
from lightning_cap.pruners import CAP, DropAndGrow, Magnitude, MagnitudeUnits
from lightning_cap.schedules import AlternatingSchedule, OneShot, PQAdaptive, SparsitySteps
from lightning_cap.sparsity import Flops, NofM
from tests.support.bad_input.table import NO_COUNTS, NO_HEALS, NO_NUMBERS, Line, wrong

SCHEDULE = {0: 0.5}
NO_NAMES: tuple[Any, ...] = ("*.weight", 3, True, [3], [None], [""], {"a": 1}, object)

bad = partial(wrong, CAPPruningCallback, given={"schedule": SCHEDULE})

LINES: list[Line] = [
    *wrong(CAPPruningCallback, "schedule", None, 0.5, "0.5", [0.5], True, torch.ones(2), words=["{0: 0.4"]),
    *wrong(CAPPruningCallback, "schedule", OneShot, words=["OneShot(...)"]),
    Line("no event", lambda _: CAPPruningCallback({}), ScheduleError, ("{}",)),
    Line("an epoch is a fraction", lambda _: CAPPruningCallback({0.5: 0.5}), ScheduleError, ("0.5",)),
    Line("an epoch is true", lambda _: CAPPruningCallback({True: 0.5}), ScheduleError, ("True",)),
    Line("a sparsity is text", lambda _: CAPPruningCallback({0: "half"}), ScheduleError, ("'half'",)),
    *bad("pruner", CAP, "CAP", 3, True, {"block_size": 3}, words=["CAP("]),
    *bad("include", *NO_NAMES),
    *bad("exclude", *NO_NAMES),
    *bad("num_recomputations", *NO_COUNTS),
    *bad("heal", *NO_HEALS),
    *bad("recalibrate", None, 1, "yes", []),
    *bad("recomputation_path", None, True, "cubic", ["linear"], 2, words=["'exponential' or 'linear'"]),
    *bad("existing_zeros", None, 1, "yes"),
    *bad("save", None, True, "all", ["last"], 3, words=["'last', 'best', 'both' or 'none'"]),
    *bad("save_sparsities", 0.5, "0.5", {0.5}, True),
    *(
        Line(f"save_sparsities={value}", partial(lambda v, _: CAPPruningCallback(SCHEDULE, save_sparsities=[v]), value),
             ScheduleError.__bases__[0], ("save_sparsities=", "[0, 1)"))
        for value in (None, "0.5", True, 1.0, float("nan"))
    ),
    *bad("dirpath", 3, True, "", ["a"]),
    *bad("monitor", 3, True, "", ["val/acc"]),
    *bad("mode", None, "avg", True, words=["'min' or 'max'"]),
    *bad("evaluate", None, 1, "yes"),
    *bad("cost", "flops", 0.5, True, ["flops"], words=["Flops()"]),
    *bad("cost", Flops, words=["Flops(...)"]),
    Line("zeros save no FLOPs", lambda _: CAPPruningCallback(SCHEDULE, cost=Flops()), UnsupportedError,
         ("cost=Flops", "CAPUnits()")),
    Line("zeros save no FLOPs of a score", lambda _: CAPPruningCallback(SCHEDULE, Magnitude(), cost=Flops()), UnsupportedError,
         ("cost=Flops", "Parameters()")),
    *(
        Line(f"units cannot grow back in {type(schedule).__name__}",
             partial(lambda s, _: CAPPruningCallback(s, MagnitudeUnits()), schedule), UnsupportedError,
             ("schedule=", "MagnitudeUnits", "no gradient"))
        for schedule in (SparsitySteps({0: 0.5, 1: 0.3}, allow_decrease=True), AlternatingSchedule(0.5, 0, 1, 1))
    ),
    Line("sparsities are not found in units", lambda _: CAPPruningCallback(PQAdaptive(0, 2), MagnitudeUnits()), UnsupportedError,
         ("schedule=PQAdaptive", "units")),
    Line("sparsities are not found where weights grow", lambda _: CAPPruningCallback(PQAdaptive(0, 2), DropAndGrow()),
         UnsupportedError, ("schedule=PQAdaptive", "grow back")),
    Line("a pattern has one sparsity", lambda _: CAPPruningCallback(PQAdaptive(0, 2), CAP(pattern=NofM(2, 4))), PatternError,
         ("schedule=PQAdaptive", "pattern=", "SparsitySteps")),
    Line("sparsities to save are not known", lambda _: CAPPruningCallback(PQAdaptive(0, 2), save_sparsities=[0.5]), ConfigError,
         ("save_sparsities=[0.5]", "PQAdaptive", "Leave it out")),
    *wrong(PDPCallback, "epoch", *NO_NUMBERS, 3.0, 0.5, -1, 2**40),
    *wrong(PDPCallback, "tau", *NO_NUMBERS, 0, -1e-4),
    *wrong(PDPCallback, "rate", "0.1", True, [0.1], float("nan"), float("inf"), 0, -0.5, 1.5),
    *bad("seed", None, "3", True, 1.0, -1, float("nan"), 2**63),
]  # fmt: skip
