"""Sharded runs (FSDP2) that are killed by SIGKILL and resumed end as the run that was never killed, bit for bit."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.support.crash_checks import Whole, check_files, check_same_end, log
from tests.support.crash_run import run_trial

pytestmark = pytest.mark.xdist_group("processes")
KILLED = -signal.SIGKILL
PHASES = (
    "train", "validate", "collect", "exchange", "solve", "reconstruct", "apply", "masks", "log", "export",
    "write checkpoint", "write weights", "rename", "remove",
)  # fmt: skip
QUICK = ("apply", "write checkpoint")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(
    "phase", [phase if phase in QUICK else pytest.param(phase, marks=pytest.mark.slow) for phase in PHASES]
)
def test_killed_and_resumed(whole: Whole, tmp_path: Path, phase: str) -> None:
    """A rank comes to the moment, and both die there: files of one of them may be written, those of the other not."""
    folder, draws = tmp_path / "run", random.Random(phase)
    expected = whole(2, fsdp=True)
    rank = draws.choice([r for r in range(2) if whole.counts(r, ranks=2, fsdp=True).get(phase)])
    nth = draws.randint(1, whole.counts(rank, ranks=2, fsdp=True)[phase])
    kill = {"phase": phase, "nth": nth, "ranks": [rank], "everyone": True}
    assert run_trial(folder, 2, fsdp=True, kill=kill) == [KILLED, KILLED], (kill, log(folder))
    check_files(folder)
    again = {"seed": 99} if (folder / "last.ckpt").exists() else {}
    assert run_trial(folder, 2, fsdp=True, **again) == [0, 0], (kill, log(folder))
    check_same_end(expected, folder, ranks=2)
