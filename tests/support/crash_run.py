"""A tiny fit in a forked process, which is killed at a planned moment. `test_crash.py` starts it and looks at what it leaves."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import threading
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from lightning_cap import QATCallback
from lightning_cap.quantization.layers import fake_quantized
from lightning_cap.schedules import OneShot, SparsitySteps
from lightning_cap.trainer.compat import averaged_models
from lightning_cap.utilities.sharded import reshard, whole
from tests.support.crash_moments import Moments, install, limit_memory
from tests.support.processes import FORKED, be_ordinary, free_port, torchrun_environment
from tests.support.sharding import ShardedToy
from tests.support.stopping import averaging
from tests.support.toy import Toy, ToyData, callback, loaders, trainer
from tests.support.unit_runs import units, weights

TARGETS = ["net.0.weight", "net.4.weight", "net.6.weight"]
SCHEDULE = {0: 0.3, 1: 0.5, 2: 0.75}
HANGS, HANGS_ALONE = 120, 60  # seconds after which a run, or a process that another one has left alone, must have ended


class DyingData(ToyData):
    """Raises, or kills its worker process, once the file ``flag`` is there."""

    def __init__(self, how: str, flag: Path) -> None:
        super().__init__()
        self.how, self.flag = how, flag

    def __getitem__(self, index: int) -> Any:
        if self.flag.exists():
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk of this rank is gone")
        return super().__getitem__(index)


class Loading(Toy):
    """Reads its data in worker processes; from the end of epoch 0 on, rank 1 cannot: ``what`` is the data that is lost."""

    def __init__(self, what: str, how: str, flag: Path) -> None:
        super().__init__()
        self.flag = flag
        self.data = {name: DyingData(how, flag) if name == what else ToyData() for name in ("training", "calibration")}

    def on_train_epoch_end(self) -> None:
        if self.global_rank == 1:
            self.flag.touch()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        pass

    def loader(self, name: str) -> Any:
        data = self.data[name] if self.global_rank == 1 else ToyData()
        return DataLoader(data, batch_size=16, num_workers=1)

    def calibration_dataloader(self) -> Any:
        return self.loader("calibration")

    def train_dataloader(self) -> Any:
        return self.loader("training")


class SmallFiles(pl.Callback):
    """From the beginning of an epoch on, writing more than so many bytes to a file fails, as on a full disk."""

    def __init__(self, epoch: int, limit: int) -> None:
        self.epoch, self.limit = epoch, limit

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch and trainer.is_global_zero:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)  # the log is a file, too
            os.dup2(nowhere, 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


def fit(order: dict[str, Any], folder: Path) -> None:
    """One ``fit`` that goes on from the last checkpoint, if there is one; what it ends with goes to ``end-RANK.pt``."""
    ranks = order["ranks"]
    pl.seed_everything(order.get("seed", 3), verbose=False)
    os.environ["PL_GLOBAL_SEED"] = "3"  # of Lightning's distributed sampler, which no checkpoint holds
    module, data = Toy(), loaders()
    if "lost" in order:
        module = Loading(*order["lost"], folder / "lost.txt")
        del data["train_dataloaders"]
    schedule = OneShot(0.75, epoch=None) if order.get("one_shot") else SparsitySteps(SCHEDULE)
    pruned = str(folder / "pruned")
    cbs = [callback(schedule, dirpath=pruned, include=TARGETS)]
    if order.get("units"):
        cbs = [units({0: 0.2, 2: 0.4}, dirpath=pruned), weights({1: 0.6, 3: 0.9}, dirpath=pruned)]
    companions: list[pl.Callback] = list(cbs)
    if "combined" in order:
        kinds = {"prune": cbs[0], "quantize": QATCallback(order["quantized"]), "average": averaging()}
        companions = [kinds[kind] for kind in order["combined"]]
    saver = ModelCheckpoint(dirpath=folder, save_last=True, **order.get("saver", {}))
    extra = [SmallFiles(*order["small_files"])] if "small_files" in order else []
    options: dict[str, Any] = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    if order.get("fsdp"):
        module, options["strategy"] = ShardedToy(), ModelParallelStrategy(ranks, 1, process_group_backend="gloo")
    t = trainer(folder, *extra, *companions, saver, max_epochs=4, enable_checkpointing=True, **options)
    t.fit(module, **data, ckpt_path="last")
    reshard(module)
    end = {
        "weights": module.state_dict(),
        "masks": [dict(cb.masks) for cb in cbs],
        "history": [record.to_json() for cb in cbs for record in cb.history],
        "optimizer": t.optimizers[0].state_dict(),
        "batches": module.batches[-4:],
    }
    if "combined" in order:
        end["averages"] = [average.state_dict() for average in averaged_models(t)]
        end["metrics"] = dict(t.callback_metrics)
        end["quantized"] = list(fake_quantized(module))
    torch.save(all_of(end), folder / f"end-{t.global_rank}.pt")


def all_of(value: Any) -> Any:
    """With whole tensors where they are sharded."""
    if isinstance(value, dict):
        return {key: all_of(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [all_of(inner) for inner in value]
    return whole(value) if isinstance(value, torch.Tensor) else value


def trial(order: dict[str, Any], folder: Path, rank: int, port: int) -> None:
    """What one process of a run does, from its start to its end or its death."""
    be_ordinary()
    os.fsync = lambda _: None  # a kill is no power cut, and a busy disk would hold the trials up
    folder.mkdir(parents=True, exist_ok=True)
    if (
        rank == 0 and not (folder / "last.ckpt").exists()
    ):  # nothing to go on from: as a user would, begin with an empty folder
        shutil.rmtree(folder / "pruned", ignore_errors=True)
    (folder / f"pid-{rank}.txt").write_text(str(os.getpid()))
    log = os.open(folder / f"log-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["ranks"] > 1:
        os.environ.update(torchrun_environment(rank, order["ranks"], port))
    kill = order.get("kill") or {}
    mine = rank in kill.get("ranks", [0])
    moments = Moments(
        kill.get("phase", "") if mine else "", kill.get("nth", 0), folder if kill.get("everyone") else None
    )
    install(moments, folder, order.get("elsewhere", False))
    if mine and "seconds" in kill:
        timer = threading.Timer(kill["seconds"], moments.die)
        timer.daemon = True
        timer.start()
    if "memory" in order and rank == 1:
        limit_memory(order["memory"])
    try:
        fit(order, folder)
    except BaseException as error:
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        raise
    (folder / f"counts-{rank}.json").write_text(json.dumps(moments.counts))


def run_trial(folder: Path, ranks: int = 1, **order: Any) -> list[int | None]:
    """Exit code of each rank: 0, 1 after an exception, -9 after a kill, None for one that hung."""
    given, port = {"ranks": ranks, **order}, free_port()
    processes = [FORKED.Process(target=trial, args=(given, folder, rank, port)) for rank in range(ranks)]
    for process in processes:
        process.start()
    running = {process.sentinel for process in processes}
    for patience in (HANGS, *[HANGS_ALONE] * (ranks - 1)):  # for the first to end, and then for the others
        running -= set(wait(running, patience)) if running else set()
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes
