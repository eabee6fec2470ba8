"""Killed by SIGKILL anywhere and resumed, a run ends as the run that was never killed, bit for bit. And other mishaps."""

from __future__ import annotations

import copy
import dataclasses
import random
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_cap import CAPPruningCallback
from lightning_cap.errors import GradientError
from lightning_cap.pruners import PruneResult
from lightning_cap.pruners.blockwise import BlockwisePath
from lightning_cap.schedules import SparsitySteps
from lightning_cap.sparsity.targets import Targets
from tests.support.crash_checks import Whole, check_checkpoint, check_files, check_same_end, events, load, log, same
from tests.support.crash_run import SCHEDULE, TARGETS, run_trial
from tests.support.toy import Toy, callback, loaders, trainer

KILLED = -signal.SIGKILL
PHASES = (
    "train", "validate", "collect", "solve", "reconstruct", "apply", "masks", "log", "export",
    "write checkpoint", "write weights", "rename", "remove",
)  # fmt: skip
QUICK = ("train", "solve", "apply", "write checkpoint")  # of the phases; the others are slow tests
EPOCH_END = {"saver": {"save_on_train_epoch_end": True}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("whole"))


def draw(whole: Whole, phase: str, seed: int, **order: Any) -> dict[str, Any]:
    """One of the moments of a phase, in a run that is never stopped."""
    count = whole.counts(**order)[phase]
    return {"phase": phase, "nth": random.Random(f"{phase}{seed}").randint(1, count)}


def resume(folder: Path, **order: Any) -> list[int | None]:
    """Start again, as a user would. What was drawn comes from the checkpoint, if there is one, whatever the seed is now."""
    return run_trial(folder, **order, **({"seed": 99} if (folder / "last.ckpt").exists() else {}))


def kill_and_resume(whole: Whole, folder: Path, phase: str, seed: int) -> None:
    order = EPOCH_END if seed % 2 else {}
    kill = draw(whole, phase, seed, **order)
    assert run_trial(folder, kill=kill, **order) == [KILLED], (kill, log(folder))
    check_files(folder)
    assert resume(folder, **order) == [0], (kill, log(folder))
    check_same_end(whole(**order), folder)


@pytest.mark.parametrize("seed", range(1))
@pytest.mark.parametrize(
    "phase", [phase if phase in QUICK else pytest.param(phase, marks=pytest.mark.slow) for phase in PHASES]
)
def test_killed_once(whole: Whole, tmp_path: Path, phase: str, seed: int) -> None:
    kill_and_resume(whole, tmp_path / "run", phase, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 10))
@pytest.mark.parametrize("phase", PHASES)
def test_killed_once_at_more_moments(whole: Whole, tmp_path: Path, phase: str, seed: int) -> None:
    kill_and_resume(whole, tmp_path / "run", phase, seed)


def kill_by_the_clock(whole: Whole, folder: Path, seed: int) -> None:
    """Kill again and again, at any time, until the run gets to its end."""
    expected, draws = whole(), random.Random(seed)
    started = time.monotonic()
    run_trial(folder / "timed")
    length = time.monotonic() - started
    codes: list[int | None] = [KILLED]
    for _ in range(4):
        codes = resume(folder, kill={"seconds": draws.uniform(0.05, length)})
        assert codes in ([KILLED], [0]), log(folder)
        check_files(folder)
    if codes == [KILLED]:
        assert resume(folder) == [0], log(folder)
    check_same_end(expected, folder)


@pytest.mark.parametrize("seed", range(1))
def test_killed_by_the_clock(whole: Whole, tmp_path: Path, seed: int) -> None:
    kill_by_the_clock(whole, tmp_path / "run", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 22))
def test_killed_by_the_clock_more_often(whole: Whole, tmp_path: Path, seed: int) -> None:
    kill_by_the_clock(whole, tmp_path / "run", seed)


@pytest.mark.parametrize("phase", ["collect", pytest.param("rename", marks=pytest.mark.slow)])
def test_killed_in_every_attempt(whole: Whole, tmp_path: Path, phase: str) -> None:
    folder, attempts = tmp_path / "run", 0
    for nth in (8, 2, 5, 9, 14, 20):
        codes = resume(folder, kill={"phase": phase, "nth": nth})
        check_files(folder)
        attempts += codes == [KILLED]
    assert attempts >= 2
    assert resume(folder, kill={"phase": "load", "nth": 2}) == [KILLED]
    assert resume(folder) == [0]
    check_same_end(whole(), folder)


@pytest.mark.parametrize(
    "phase", ["apply", *(pytest.param(phase, marks=pytest.mark.slow) for phase in ("collect", "rename"))]
)
def test_killed_in_the_event_at_the_end_of_training(whole: Whole, tmp_path: Path, phase: str) -> None:
    """Lightning's last checkpoint is from before it: on resuming there is nothing to train, but the model is to be pruned."""
    folder, order = tmp_path / "run", {"one_shot": True}
    expected = whole(**order)
    kill = {"phase": phase, "nth": whole.counts(**order)[phase] - 1}
    assert run_trial(folder, kill=kill, **order) == [KILLED]
    assert resume(folder, **order) == [0], log(folder)
    same(*(load(f / "end-0.pt", f)["masks"] for f in (expected, folder)))
    same(*(load(f / "end-0.pt", f)["weights"] for f in (expected, folder)))


@pytest.mark.parametrize(
    ("phase", "after"),
    [
        ("apply", 0),
        *(pytest.param(*given, marks=pytest.mark.slow) for given in (("masks", 2), ("rename", 3), ("train", 9))),
    ],
)
def test_killed_with_units_and_weights(whole: Whole, tmp_path: Path, phase: str, after: int) -> None:
    """Two callbacks in one run, of which each has an event in every other epoch."""
    order, folder = {"units": True}, tmp_path / "run"
    expected = whole(**order)
    kill = {"phase": phase, "nth": min(after + 1, whole.counts(**order)[phase])}
    assert run_trial(folder, kill=kill, **order) == [KILLED], log(folder)
    check_files(folder)
    assert resume(folder, **order) == [0], log(folder)
    check_same_end(expected, folder)


@pytest.mark.parametrize("phase", ["copy", "write checkpoint"])
def test_checkpoints_on_another_file_system_than_temporary_files(whole: Whole, tmp_path: Path, phase: str) -> None:
    order, folder = {"elsewhere": True}, tmp_path / "run"
    if not whole.counts(**order).get(phase):
        assert phase == "copy"
        return  # nothing is copied over the border between them
    assert run_trial(folder, kill={"phase": phase, "nth": 6}, **order) == [KILLED]
    check_files(folder)
    assert resume(folder, **order) == [0], log(folder)
    check_same_end(whole(), folder)


def ranks_killed(whole: Whole, folder: Path, phase: str, nth: int, rank: int, everyone: bool = False) -> None:
    kill = {"phase": phase, "nth": nth, "ranks": [rank], "everyone": everyone}
    expected = whole(2)
    codes = run_trial(folder, 2, kill=kill)
    assert codes[rank] == KILLED
    assert codes[1 - rank] == (KILLED if everyone else 1), "it ends by itself"
    check_files(folder)
    assert resume(folder, ranks=2) == [0, 0], log(folder)
    check_same_end(expected, folder, ranks=2)


ONE_OF_TWO = [
    ("train", 9, 1), ("collect", 2, 1), ("exchange", 5, 0), ("solve", 4, 0), ("apply", 5, 1), ("write checkpoint", 5, 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("phase", "nth", "rank"), [ONE_OF_TWO[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in ONE_OF_TWO[2::2])]
)
def test_one_of_two_ranks_killed(whole: Whole, tmp_path: Path, phase: str, nth: int, rank: int) -> None:
    ranks_killed(whole, tmp_path / "run", phase, nth, rank)


@pytest.mark.parametrize(
    ("phase", "nth", "rank"), [ONE_OF_TWO[1], *(pytest.param(*one, marks=pytest.mark.slow) for one in ONE_OF_TWO[3::2])]
)
def test_both_ranks_killed(whole: Whole, tmp_path: Path, phase: str, nth: int, rank: int) -> None:
    ranks_killed(whole, tmp_path / "run", phase, nth, rank, everyone=True)


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("phase", [*PHASES, "exchange"])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_killed_at_more_moments(whole: Whole, tmp_path: Path, phase: str, seed: int, everyone: bool) -> None:
    draws = random.Random(f"{phase}{seed}")
    rank = draws.choice([r for r in range(2) if whole.counts(r, ranks=2).get(phase)])
    nth = draws.randint(1, whole.counts(rank, ranks=2)[phase])
    ranks_killed(whole, tmp_path / "run", phase, nth, rank, everyone)


@pytest.mark.parametrize("how", ["raise", "kill"])
@pytest.mark.parametrize("what", ["calibration", "training"])
def test_a_rank_that_loses_its_data(tmp_path: Path, what: str, how: str) -> None:
    """From epoch 1 on. What one rank says, both say, if it happens in an event."""
    assert run_trial(tmp_path, 2, lost=[what, how]) == [1, 1]
    errors = [(tmp_path / f"error-{rank}.txt").read_text() for rank in range(2)]
    message = "the disk of this rank is gone" if how == "raise" else "DataLoader worker"
    assert message in errors[1]
    if what == "calibration":
        assert "Collecting gradients failed on another process; rank 1" in errors[0]
        assert message in errors[0]
    else:
        assert "onnection" in errors[0], "by gloo: training is Lightning's"
    check_files(tmp_path)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(("limit", "file"), [(20_000, "checkpoint"), (800, "events")])
def test_a_disk_that_fills_up(whole: Whole, tmp_path: Path, ranks: int, limit: int, file: str) -> None:
    """From epoch 1 on, the system takes no more than some bytes of a file."""
    folder = tmp_path / "run"
    assert run_trial(folder, ranks, small_files=[1, limit]) == [1] * ranks
    errors = [(folder / f"error-{rank}.txt").read_text() for rank in range(ranks)]
    assert "File too large" in errors[0]
    assert "File too large" in errors[-1] or file == "checkpoint", "which Lightning writes, on rank 0"
    check_files(folder)
    assert not list(folder.rglob("*.tmp")), "what an exception ends is tidied up"
    assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 0
    assert resume(folder, ranks=ranks) == [0] * ranks
    check_same_end(whole(ranks), folder, ranks)


def test_a_solver_that_is_out_of_memory_on_one_rank(whole: Whole, tmp_path: Path) -> None:
    enough, none = tmp_path / "enough", tmp_path / "none"
    assert run_trial(enough, 2, memory=3) == [0, 0], log(enough)
    assert "Out of memory in the solver; going on with chunks of" in (enough / "log-1.txt").read_text()
    assert "Out of memory" not in (enough / "log-0.txt").read_text()
    check_same_end(whole(2), enough, ranks=2)
    assert run_trial(none, 2, memory=0) == [1, 1], "not even one block fits"
    for rank in range(2):
        assert "out of memory" in (none / f"error-{rank}.txt").read_text()
    check_files(none)


class Diverging(Toy):
    """Its loss is NaN in the first step of epoch ``at``, right after an event."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.trainer.current_epoch == self.at and batch_idx == 0 and self.training else loss


def run_here(folder: Path, *callbacks: pl.Callback, at: int = -1, ckpt: Path | None = None) -> Any:
    """``(module, callback, error)`` of a run in this process."""
    pl.seed_everything(3, verbose=False)
    module = Diverging(at)
    cb = callback(SparsitySteps(SCHEDULE), dirpath=str(folder / "pruned"), include=TARGETS)
    saver = ModelCheckpoint(dirpath=folder, save_last=True)
    t = trainer(folder, *callbacks, cb, saver, enable_checkpointing=True, max_epochs=4)
    try:
        t.fit(module, **loaders(), ckpt_path=ckpt)
    except Exception as error:
        return module, cb, error
    return module, cb, None


def test_a_loss_that_is_nan_right_after_an_event(tmp_path: Path) -> None:
    """It shows as in a dense model. The next event refuses; what was saved before is sound and can be gone on from."""
    sound, _, _ = run_here(tmp_path / "sound")
    module, cb, error = run_here(tmp_path / "nan", at=1)
    assert isinstance(error, GradientError)
    assert "is not finite" in str(error)
    assert torch.isnan(module.net[4].weight).all()
    assert cb.masks.global_sparsity == 0.5, "masks are exact"
    assert cb.state_dict()["done"] == [0, 1], "the event at epoch 2 has not happened"
    assert len(events(tmp_path / "nan")) == 2
    before = tmp_path / "nan/pruned/sparsity=0.30.ckpt"
    check_checkpoint(before)
    again, _, error = run_here(tmp_path / "again", ckpt=before)
    assert error is None
    same(again.state_dict(), sound.state_dict())


class Remember(pl.Callback):
    """Has the state right before the event at epoch 1."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            cb = next(c for c in trainer.callbacks if isinstance(c, CAPPruningCallback))
            self.state = copy.deepcopy({"weights": pl_module.state_dict(), "masks": dict(cb.masks)})
            self.armed = True

    armed = False


class Unmovable(torch.Tensor):
    def to(self, *_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("where", ["weights", "masks"])
def test_an_event_that_fails_while_it_is_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """It leaves nothing behind, as when an exception checkpoint is saved then."""
    remember = Remember()
    at, restore = BlockwisePath.at, Targets.restore

    def at_then(self: BlockwisePath, sparsity: float) -> PruneResult:
        result = at(self, sparsity)
        mask = result.masks["net.6.weight"]
        masks = {**result.masks, "net.6.weight": mask.as_subclass(Unmovable) if remember.armed else mask}
        return dataclasses.replace(result, masks=masks)

    def restore_half(self: Targets, weights: Any) -> None:
        if not remember.armed:
            return restore(self, weights)
        remember.armed = False
        restore(self, {"net.0.weight": weights["net.0.weight"]})
        raise torch.OutOfMemoryError("CUDA out of memory.")

    if where == "masks":
        monkeypatch.setattr(BlockwisePath, "at", at_then)
    else:
        monkeypatch.setattr(Targets, "restore", restore_half)
    module, cb, error = run_here(tmp_path, remember)
    assert isinstance(error, torch.OutOfMemoryError)
    same({"weights": module.state_dict(), "masks": dict(cb.masks)}, remember.state)
    assert cb.state_dict()["done"] == [0]
    assert cb.state_dict()["collection_index"] == 1
