"""Killed by SIGKILL anywhere and resumed, a run that prunes, quantizes and averages ends as the run that was never killed."""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.crash_checks import Whole, check_files, check_same_end, load, log, same
from tests.support.crash_run import run_trial
from tests.support.stopping import averaging

pytest.importorskip("torchao.quantization.qat")  # here, not in every process that is forked

ORDERS = [list(order) for order in itertools.permutations(("prune", "quantize", "average"))]
FORWARDS, BACKWARDS = ORDERS[0], ORDERS[-1]
LAYERS = ["net.0", "net.4", "net.6"]
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    averaging()  # or skip
    return Whole(tmp_path_factory.mktemp("whole"))


def kill(whole: Whole, phase: str, share: float, **order: Any) -> dict[str, Any]:
    """The moment at a share of those of a phase."""
    return {"phase": phase, "nth": max(1, round(share * whole.counts(**order)[phase]))}


def kill_and_resume(whole: Whole, folder: Path, phase: str, share: float, **order: Any) -> None:
    killed = run_trial(folder, kill=kill(whole, phase, share, **order), **order)
    assert killed == [KILLED], log(folder)
    check_files(folder)
    assert run_trial(folder, seed=99, **order) == [0], log(folder)
    check_same_end(whole(**order), folder)


#: Phase, the share of its moments, and the epoch that quantizes: events are at epochs 0, 1 and 2, the end is after 3.
MOMENTS = {
    "before the first int8 epoch": ("train", 0.45, 2),
    "after it": ("train", 0.8, 1),
    "in the event at it": ("collect", 0.6, 1),
    "in a later event": ("apply", 1.0, 1),
    "in writing a checkpoint before it": ("write checkpoint", 0.4, 2),
    "in writing a checkpoint after it": ("write checkpoint", 0.8, 1),
    "in solving": ("solve", 0.9, 1),
    "in putting masks in force": ("masks", 0.6, 1),
    "in validating": ("validate", 0.7, 1),
    "in giving a checkpoint its name": ("rename", 0.7, 1),
}
QUICK = [("after it", FORWARDS), ("in the event at it", BACKWARDS), ("in writing a checkpoint before it", BACKWARDS)]


@pytest.mark.parametrize(
    ("moment", "order"),
    [
        pytest.param(
            moment, order, id=f"{moment}-{' '.join(order)}", marks=() if (moment, order) in QUICK else pytest.mark.slow
        )
        for moment in MOMENTS
        for order in (FORWARDS, BACKWARDS, ORDERS[2])
    ],
)
def test_killed_and_resumed(whole: Whole, tmp_path: Path, moment: str, order: list[str]) -> None:
    phase, share, epoch = MOMENTS[moment]
    kill_and_resume(whole, tmp_path / "run", phase, share, combined=order, quantized=epoch)


@pytest.mark.parametrize("epoch", [1, 3])
@pytest.mark.parametrize(
    "order", [BACKWARDS, *(pytest.param(order, marks=pytest.mark.slow) for order in ORDERS[1:-1])], ids=" ".join
)
def test_the_order_changes_nothing(whole: Whole, order: list[str], epoch: int) -> None:
    """Not even one bit, whether int8 begins at the epoch of an event or between them."""
    ends = [load(folder / "end-0.pt", folder) for given in (FORWARDS, order)
            if (folder := whole(combined=given, quantized=epoch))]  # fmt: skip
    same(*ends)
    assert ends[0]["quantized"] == LAYERS
    assert ends[0]["averages"]
    assert "val_acc" in ends[0]["metrics"]


def test_resumed_in_another_order(whole: Whole, tmp_path: Path) -> None:
    folder, given, other = tmp_path / "run", {"combined": FORWARDS}, {"combined": BACKWARDS}
    order = {"quantized": 1}
    planned = kill(whole, "apply", 1.0, **given, **order)
    assert run_trial(folder, kill=planned, **given, **order) == [KILLED]
    assert run_trial(folder, seed=99, **other, **order) == [0], log(folder)
    check_same_end(whole(**given, **order), folder)


@pytest.mark.slow
@pytest.mark.parametrize("order", [FORWARDS, BACKWARDS], ids=" ".join)
def test_both_ranks_killed(whole: Whole, tmp_path: Path, order: list[str]) -> None:
    folder, given = tmp_path / "run", {"combined": order, "quantized": 1}
    planned = {**kill(whole, "train", 0.8, ranks=2, **given), "ranks": [0], "everyone": True}
    assert run_trial(folder, 2, kill=planned, **given) == [KILLED, KILLED]
    check_files(folder)
    assert run_trial(folder, 2, seed=99, **given) == [0, 0], log(folder)
    check_same_end(whole(2, **given), folder, ranks=2)


@pytest.mark.parametrize("order", [FORWARDS, BACKWARDS], ids=" ".join)
def test_killed_in_the_event_at_the_end_of_training(whole: Whole, tmp_path: Path, order: list[str]) -> None:
    """What is pruned are the averages, which Lightning ends with: in either order, and when there is nothing left to train."""
    folder, given = tmp_path / "run", {"quantized": 1, "one_shot": True}
    planned = kill(whole, "apply", 1.0, combined=order, **given)
    assert run_trial(folder, kill=planned, combined=order, **given) == [KILLED]
    assert run_trial(folder, seed=99, combined=order, **given) == [0], log(folder)
    ends = [
        load(f / "end-0.pt", f) for f in (whole(combined=FORWARDS, **given), whole(combined=order, **given), folder)
    ]
    for key in ("masks", "weights", "averages", "quantized"):
        same(ends[0][key], ends[1][key], key)
        same(ends[0][key], ends[2][key], key)
