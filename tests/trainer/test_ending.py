"""Runs that are told to end by a signal in a pruning event, and what they go on to be."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lightning_cap.callbacks.pruning as pruning_module
import lightning_cap.callbacks.saving_run as saving_run
from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.calibration.sharded_rows import ShardedRowComputer
from lightning_cap.schedules import OneShot
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.records import EVENTS, EventRecord
from lightning_cap.trainer.run_records import RUN, RunRecord
from lightning_cap.utilities.records import read_records
from lightning_cap.utilities.sharded import reshard, whole
from tests.support.processes import as_by_torchrun
from tests.support.sharding import ShardedToy
from tests.support.stopping import assert_same
from tests.support.toy import Toy, callback, loaders, trainer, zeros

eliminate_module = sys.modules["lightning_cap.solver.eliminate"]  # its name in the package is the function

PLACES: dict[str, tuple[Any, str]] = {
    "collect": (GradientCollector, "_rows"),
    "solve": (eliminate_module, "_eliminate_chunk"),
    "apply": (Targets, "restore"),
    "evaluate": (pruning_module, "evaluate"),
    "collect shards": (ShardedRowComputer, "row"),
    "validate": (Toy, "validation_step"),
    "save": (saving_run, "save_checkpoint"),
}


def tell(monkeypatch: pytest.MonkeyPatch, place: str, nth: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal at the nth call of a function that events call."""
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == nth:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def run(folder: Path, seed: int = 5, ckpt: Any = None, events: Any = None, more: Any = (), **options: Any) -> Any:
    """``(module, callback, trainer, whether it was ended)`` of four epochs with events at 0 and 2."""
    pl.seed_everything(seed, verbose=False)
    module = ShardedToy() if isinstance(options.get("strategy"), ModelParallelStrategy) else Toy()
    cb = callback(events or {0: 0.5, 2: 0.75}, dirpath=str(folder / "pruned"))
    t = trainer(folder, cb, *more, enable_checkpointing=bool(more), **options)
    try:
        t.fit(module, **loaders(), ckpt_path=ckpt)
    except SIGTERMException:
        return module, cb, t, True
    return module, cb, t, False


def records(folder: Path, **left_out: Any) -> list[EventRecord]:
    found = read_records(folder / "pruned" / EVENTS, EventRecord)
    return [replace(record, seconds={}, measured_bytes=None, **left_out) for record in found]


@pytest.mark.parametrize(
    ("place", "nth", "done"),
    [
        ("collect", 1, []), ("collect", 5, [0]), ("solve", 1, []), ("solve", 2, [0]), ("apply", 2, [0, 2]),
        ("evaluate", 1, []), ("evaluate", 2, [0]), ("evaluate", 3, [0]), ("evaluate", 4, [0, 2]),
    ],
)  # fmt: skip
def test_a_run_told_to_end_in_an_event_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, nth: int, done: list[int]
) -> None:
    whole, *_ = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        tell(patch, place, nth)
        stopped, cb, t, ended = run(tmp_path / "cut")
    assert ended
    assert t.received_sigterm
    assert cb.state_dict()["done"] == done
    assert float(zeros(stopped).float().mean()) == [0.0, 0.5, 0.75][len(done)], "an event is done, or has left no trace"
    assert read_records(tmp_path / "cut/pruned" / RUN, RunRecord)[-1].state == "stopped"
    resumed, _, _, ended = run(tmp_path / "cut", seed=99, ckpt=tmp_path / "cut/pruned/stopped.ckpt")
    assert not ended
    assert_same(whole, resumed)
    assert whole.batches[-4:] == resumed.batches[-4:]
    cut = (place, nth) in (
        ("evaluate", 2),
        ("evaluate", 4),
        ("apply", 2),
    )  # the event is done, its last validation is not
    told = {"after": {}} if cut else {}
    assert records(tmp_path / "whole", **told) == records(tmp_path / "cut", **told)


def test_told_to_end_in_the_event_at_the_end_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = OneShot(0.75, epoch=None)
    whole, *_ = run(tmp_path / "whole", events=events)
    for name, place, nth, ends in (("early", "collect", 1, True), ("late", "evaluate", 2, False)):
        with monkeypatch.context() as patch:
            tell(patch, place, nth)
            module, *_, ended = run(tmp_path / name, events=events)
        assert ended is ends, "nothing is left to do where the event is done"
        if ends:
            assert not zeros(module).any()
            module, *_ = run(tmp_path / name, 99, tmp_path / name / "pruned/stopped.ckpt", events)
        assert_same(whole, module)
        assert (tmp_path / name / "pruned/sparsity=0.75.ckpt").exists()


def end_on_shards(folder: Path) -> float:
    """Told to end in the event at the end of training, gone on with, and begun again when all is done."""
    events = OneShot(0.75, epoch=None)

    def go(ckpt: Any = None) -> Any:
        strategy: Any = ModelParallelStrategy(1, 1, process_group_backend="gloo")
        return run(folder, 5, ckpt, events, strategy=strategy)

    with pytest.MonkeyPatch.context() as patch:
        tell(patch, "collect shards", 2)
        assert go()[-1]
    stopped, done = (folder / "pruned" / name for name in ("stopped.ckpt", "sparsity=0.75.ckpt"))
    assert not done.exists()
    _, cb, _, ended = go(stopped)
    assert not ended
    assert done.exists()
    assert read_records(folder / "pruned" / RUN, RunRecord)[-1].state == "finished"
    _, again, *_ = go(done)
    assert again.history == cb.history
    sparsity: float = again.masks.global_sparsity
    return sparsity


@pytest.mark.xdist_group("processes")
def test_a_sharded_run_with_nothing_left_to_train(tmp_path: Path) -> None:
    """Lightning loads its checkpoint late, and calls no hook of the training."""
    assert as_by_torchrun(1, tmp_path, end_on_shards, tmp_path / "run") == [0.75]


def test_told_to_end_before_the_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Told(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    pl.seed_everything(5, verbose=False)
    cb = callback({0: 0.5, 2: 0.75}, dirpath=str(tmp_path / "pruned"))
    with pytest.raises(SIGTERMException):
        trainer(tmp_path, Told(), cb).fit(Toy(), **loaders())
    assert cb.state_dict()["done"] == [0]
    assert (tmp_path / "pruned/stopped.ckpt").exists()


def saving_model_checkpoint(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "on_exception", save_on_exception=True, every_n_epochs=100)


@pytest.mark.parametrize("make", [OnExceptionCheckpoint, saving_model_checkpoint])
def test_checkpoints_that_others_save_then_can_be_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], pl.Callback]
) -> None:
    """Lightning itself leaves out an epoch, when it goes on from a checkpoint of the epoch's start."""
    whole, *_ = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        tell(patch, "collect", 5)
        run(tmp_path / "cut", more=[make(tmp_path)])
    resumed, *_ = run(tmp_path / "cut", 99, tmp_path / "on_exception.ckpt")
    assert_same(whole, resumed)


def test_slurm_gets_its_checkpoint_between_two_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is from before the event, and the run goes on until SLURM ends it."""
    whole, *_ = run(tmp_path / "whole")
    asked: list[Any] = []
    with monkeypatch.context() as patch:
        for name, value in {
            "JOB_ID": 1,
            "NTASKS": 1,
            "NTASKS_PER_NODE": 1,
            "PROCID": 0,
            "LOCALID": 0,
            "NODEID": 0,
        }.items():
            patch.setenv(f"SLURM_{name}", str(value))
        patch.setattr(
            "lightning.pytorch.trainer.connectors.signal_connector.call", lambda command: asked.append(command) or 0
        )
        tell(patch, "collect", 5, signal.SIGUSR1)
        module, *_, ended = run(tmp_path / "cut", plugins=SLURMEnvironment(requeue_signal=signal.SIGUSR1))
    assert not ended
    assert asked == [["scontrol", "requeue", "1"]]
    assert_same(whole, module)
    resumed, *_ = run(tmp_path / "again", 99, tmp_path / "cut/hpc_ckpt_1.ckpt")
    assert_same(whole, resumed)
    assert torch.load(tmp_path / "cut/hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 8


def test_the_users_own_handler_is_called_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        tell(monkeypatch, "collect", 1)
        assert run(tmp_path)[-1]
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_files_are_written_where_none_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, "collect", 1)
    pl.seed_everything(5, verbose=False)
    with pytest.raises(SIGTERMException):
        trainer(tmp_path, callback({0: 0.5}, save="none")).fit(Toy(), **loaders())
    assert not list(tmp_path.rglob("*.ckpt"))


def on_a_rank(folder: Path, how: str, told: list[int], place: str = "", nth: int = 2, ckpt: Any = None) -> Any:
    """Whether the run was ended, its weights and its last batches; the ranks in ``told`` get the signal in an event.

    Rank 1 gets another one while the checkpoint is written, as from a system that asks twice.
    """
    if int(os.environ["RANK"]) in told:
        tell(pytest.MonkeyPatch(), place, nth)
    if told and int(os.environ["RANK"]) == 1:
        tell(pytest.MonkeyPatch(), "save", 1)
    os.environ["PL_GLOBAL_SEED"] = "5"
    strategy: Any = ModelParallelStrategy(2, 1, process_group_backend="gloo") if how == "fsdp" else how
    module, _, t, ended = run(folder, 99 if ckpt else 5, ckpt, devices=2, strategy=strategy)
    assert t.received_sigterm is ended
    reshard(module)
    return ended, {name: whole(value) for name, value in module.state_dict().items()}, module.batches[-4:]


QUICK = [("ddp", "solve", 2, [1]), ("fsdp", "collect shards", 30, [1])]
SLOW = [
    *(("ddp", *given) for given in (("solve", 2, [0]), ("solve", 2, [0, 1]), ("evaluate", 2, [1]))),
    *(("fsdp", *given) for given in (("collect shards", 3, [0]), ("solve", 2, [0, 1]), ("apply", 2, [0]))),
    *(("fsdp", "validate", nth, [1]) for nth in (1, 2)),
]


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    ("how", "place", "nth", "told"), [*QUICK, *(pytest.param(*given, marks=pytest.mark.slow) for given in SLOW)]
)
def test_all_ranks_end_if_one_is_told_to(tmp_path: Path, how: str, place: str, nth: int, told: list[int]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = as_by_torchrun(2, tmp_path, on_a_rank, whole, how, [])
    assert [ended for ended, *_ in as_by_torchrun(2, tmp_path, on_a_rank, cut, how, told, place, nth)] == [True, True]
    found = as_by_torchrun(2, tmp_path, on_a_rank, cut, how, [], ckpt=cut / "pruned/stopped.ckpt")
    for (_, weights, batches), (ended, resumed, again) in zip(expected, found, strict=True):
        assert not ended
        assert batches == again
        assert all(torch.equal(value, resumed[name]) for name, value in weights.items())
