"""Runs tiny fits in forked processes and kills them at planned moments. `test_crash.py` starts it once and sends it orders.

An order is one line of JSON on the standard input, the answer one on the standard output. Every trial is forked from this
process, which has imported everything and loaded the compiled solver, but has computed no gradient (autograd does not survive
a fork).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_cap.schedules import OneShot, SparsitySteps
from lightning_cap.solver import eliminate, reconstruct
from lightning_cap.sparsity.patterns import Unstructured
from tests.support.crash_moments import Moments, install, limit_memory
from tests.support.toy import Toy, ToyData, callback, loaders, trainer

TARGETS = ["net.0.weight", "net.4.weight", "net.6.weight"]
SCHEDULE = {0: 0.3, 1: 0.5, 2: 0.75}


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
    cb = callback(schedule, dirpath=str(folder / "pruned"), include=TARGETS)
    saver = ModelCheckpoint(dirpath=folder, save_last=True, **order.get("saver", {}))
    extra = [SmallFiles(*order["small_files"])] if "small_files" in order else []
    options = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
    t = trainer(folder, *extra, cb, saver, max_epochs=4, enable_checkpointing=True, **options)
    t.fit(module, **data, ckpt_path="last")
    end = {
        "weights": module.state_dict(),
        "masks": dict(cb.masks),
        "history": [record.to_json() for record in cb.history],
        "optimizer": t.optimizers[0].state_dict(),
        "batches": module.batches[-4:],
    }
    torch.save(end, folder / f"end-{t.global_rank}.pt")


def trial(order: dict[str, Any], rank: int, port: int) -> None:
    """In the forked process."""
    folder = Path(order["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"log-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["ranks"] > 1:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0,
                 "WORLD_SIZE": order["ranks"], "LOCAL_WORLD_SIZE": order["ranks"], "TORCHELASTIC_RUN_ID": "trial"}  # fmt: skip
        os.environ.update({name: str(value) for name, value in place.items()})  # as torchrun does
    kill = order.get("kill") or {}
    mine = rank in kill.get("ranks", [0])
    moments = Moments(kill.get("phase", "") if mine else "", kill.get("nth", 0), kill.get("everyone", False))
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


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks of a trial and wait for them: exit codes and seconds of each, ``None`` for one that hung."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, group, children = time.monotonic(), 0, []
    for rank in range(order["ranks"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setpgid(0, group)
                trial(order, rank, port)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        group = group or pid
        os.setpgid(pid, group)
        children.append(pid)
    ended: dict[int, tuple[int, float]] = {}
    while len(ended) < len(children) and time.monotonic() - started < order.get("limit", 120):
        for rank, pid in enumerate(children):
            if rank not in ended:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic() - started
        time.sleep(0.005)
    for rank, pid in enumerate(children):
        if rank not in ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    both = [ended.get(rank, (None, order.get("limit", 120))) for rank in range(len(children))]
    return {"codes": [code for code, _ in both], "seconds": [seconds for _, seconds in both]}


def warm() -> None:
    """Load the compiled solver."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 32, 16, generator=generator)
    fisher, weights, alive = rows.mT @ rows / 32, torch.randn(2, 16, generator=generator), torch.ones(2, 16).bool()
    out = eliminate(fisher, weights, alive, 1e-4, Unstructured())
    reconstruct(fisher, weights, alive, out.rank < 4, out.damp, out.use_float64)


def main() -> None:
    """Answer orders until the standard input ends."""
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # a kill is no power cut, and a busy disk would hold the trials up
    warm()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else goes to the answers
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
