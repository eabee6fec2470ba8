"""What goes wrong on one process is told by all of them, wherever it happens; none is left waiting."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from lightning_cap.callbacks.checkpoint_io import AtomicCheckpointIO
from lightning_cap.pruners import CAP
from lightning_cap.pruners.paths import PruneResult
from lightning_cap.trainer.event import PruningEvent
from lightning_cap.utilities import distributed
from tests.support.ddp_run import Calibrated
from tests.support.processes import as_by_torchrun, on_ranks
from tests.support.toy import callback, cap, loaders, trainer


def failing(kept: Callable[..., Any], rank: int = 1, when: Callable[[], bool] = lambda: True) -> Callable[..., Any]:
    """A function that does as ``kept`` on the other ranks."""

    def function(*args: Any, **named: Any) -> Any:
        if distributed.rank() == rank and when():
            raise OSError(errno.ENOSPC, "gone is the disk")
        return kept(*args, **named)

    return function


def fit_in(folder: Path) -> str:
    """The error of a run."""
    cb = callback({0: 0.5}, pruner=cap(num_gradients=16), dirpath=str(folder / "out"))
    try:
        trainer(folder, cb, devices=2, strategy="ddp", max_epochs=1).fit(Calibrated(), **loaders())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def fail_everywhere(folder: Path) -> list[str]:
    errors = []
    started = False

    def start(*_: Any) -> bool:
        nonlocal started
        started = True
        return True

    validates = lambda: started  # noqa: E731 - the sanity check is Lightning's own
    places: list[tuple[Any, str, dict[str, Any]]] = [
        (CAP, "plan", {}),
        (CAP, "path", {}),
        (PruneResult, "apply", {}),
        (Calibrated, "validation_step", {"when": validates}),
        (AtomicCheckpointIO, "save_checkpoint", {"rank": 0}),
    ]
    for owner, name, settings in places:
        started = False
        run = PruningEvent.run
        with (
            mock.patch.object(owner, name, failing(getattr(owner, name), **settings)),
            mock.patch.object(PruningEvent, "run", lambda *args: (run(*args), start())[0]),  # noqa: B023
        ):
            errors.append(fit_in(folder))
    return errors


def test_the_message_of_the_failing_process_reaches_the_others(tmp_path: Path) -> None:
    one, other = as_by_torchrun(2, tmp_path, fail_everywhere, tmp_path)
    for first, second in zip(one[:-1], other[:-1], strict=True):
        assert "gone is the disk" in second
        assert first.startswith("CAPError")
        assert "rank 1: OSError: [Errno 28] gone is the disk" in first
    for place, message in zip(("plan", "event", "event", "validation"), one, strict=False):
        assert place in message.split(" failed on another process")[0]
    assert one[-1].startswith("OSError")
    assert other[-1].startswith("CAPError: Writing")
    assert re.search(r"sparsity=0\.50(-v\d)?\.ckpt failed on another process; rank 0: OSError", other[-1])


def communicate(fails_on: int | None, at: int) -> str:
    told: list[Any] = []
    try:
        with distributed.fail_together("The work"):
            for i in range(3):
                if distributed.rank() == fails_on and i == at:
                    raise ValueError(f"at {i}")
                told = distributed.gather_objects(i)
            if distributed.rank() == fails_on and at == 3:
                raise ValueError("at 3")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return str(told)


def communicate_at_all_places() -> list[str]:
    return [communicate(None, 0), *(communicate(rank, at) for rank in (0, 2) for at in range(4)), communicate(None, 0)]


def test_work_that_communicates_fails_on_all_ranks(tmp_path: Path) -> None:
    results = on_ranks(3, tmp_path, communicate_at_all_places)
    for rank, told in enumerate(results):
        assert told[0] == told[-1] == "[2, 2, 2]"
        for fails_on, at in ((r, a) for r in (0, 2) for a in range(4)):
            message = told[1 + at + (4 if fails_on else 0)]
            if rank == fails_on:
                assert message == f"ValueError: at {at}"
            else:
                expected = f"The work failed on another process; rank {fails_on}: ValueError: at {at}"
                assert message.endswith(expected)
