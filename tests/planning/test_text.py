from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from lightning_cap.planning import RunPlan, print_plan
from lightning_cap.planning.machine import Settings
from lightning_cap.planning.text import format_seconds
from lightning_cap.pruners import CAP, DiagonalFisher, Magnitude
from tests.support.planned import planned, planned_oneshot, pruning


def _printed(plan: RunPlan) -> str:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=120))
    return out.getvalue()


def test_all_of_a_run_is_printed() -> None:
    told = _printed(planned(pruning(), settings=Settings()))
    for words in (
        "fit of VisionTransformer on 1 x cpu", "model.blocks.*.mlp.fc1.weight", "dense: first layer", "dense: last layer (head)",
        "8 targets, 86.2 % of 7.1 k parameters", "6 epochs of 22 optimizer steps, CyclicLinearLR", "| 0 to 75 %", "50 %",
        "1 pass over the data", "reads 64 gradients", "seconds of each collection: collect", "2 x sparsity=*.ckpt",
        "All events: about",
    ):  # fmt: skip
        assert words in told, told


def test_many_pruners_get_a_line_each() -> None:
    pruners = {
        "CAP": CAP(block_size=16, num_gradients=64),
        "OBD": DiagonalFisher(num_gradients=8),
        "magnitude": Magnitude(),
    }
    told = _printed(planned_oneshot(pruners=pruners))
    for name in pruners:
        assert name in told
    assert "Nothing is written." in told


def test_a_plan_is_one_document() -> None:
    plan = planned()
    line = json.dumps(plan.to_json())
    assert json.loads(line)["record"] == "plan"
    assert RunPlan.from_json(json.loads(line)) == plan


@pytest.mark.parametrize(("seconds", "told"), [(0.44, "0.4 s"), (12.3, "12 s"), (90, "1.5 min"), (7200, "2.0 h")])
def test_seconds(seconds: float, told: str) -> None:
    assert format_seconds(seconds) == told
