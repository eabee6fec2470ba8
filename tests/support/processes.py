"""Processes for tests: fresh ones, and ranks of a gloo group on the CPU.

They are forked by a server that has imported everything, so that each starts in milliseconds. The real ways to start processes
(spawn, fork, torchrun, a script of one's own) are the subject of `tests/callbacks/test_launchers.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.groups import end_group

multiprocessing.set_forkserver_preload(["tests.support.preload"])
HANGS = 300  # seconds after which processes must have ended
FORKED = multiprocessing.get_context("forkserver")


def on_ranks(world: int, folder: Path, function: Callable[..., Any], *args: Any, **named: Any) -> list[Any]:
    """What ``function(*args, **named)``, a function of a module, returns on the ranks of a group, in order of rank."""
    return _run(world, folder, _in_group, partial(function, *args, **named))


def as_by_torchrun(world: int, folder: Path, function: Callable[..., Any], *args: Any, **named: Any) -> list[Any]:
    """The same, where the group is left to Lightning: the ranks find the environment variables that torchrun sets."""
    return _run(world, folder, _in_environment, partial(function, *args, **named))


def in_fresh_process(folder: Path, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """What a function of a module returns in a process of its own, which may set threads or be left in any state."""
    return _run(1, folder, _alone, partial(function, *args, **named))[0]


def torchrun_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells each process on one machine."""
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0,
              "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def be_ordinary() -> None:
    """Have a process of the server start its own (the workers of a DataLoader) by forking, as a process of a user does."""
    multiprocessing.set_start_method("fork", force=True)
    # after a fork torch makes its pool of threads anew at the first call, which must not be that of two threads at once
    torch.set_num_threads(torch.get_num_threads())


def _run(world: int, folder: Path, how: Callable[..., Any], call: Callable[[], Any]) -> list[Any]:
    place = folder / f"ranks-{len(list(folder.iterdir()))}"
    place.mkdir()
    shared = world, str(place), free_port(), how, call
    context = mp.start_processes(_main, shared, nprocs=world, join=False, start_method="forkserver")
    deadline = time.monotonic() + HANGS
    while not context.join(timeout=10):  # raises what a rank raised
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{call} hangs")
    return [torch.load(place / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _main(rank: int, world: int, place: str, port: int, how: Callable[..., Any], call: Callable[[], Any]) -> None:
    be_ordinary()
    torch.save(how(rank, world, place, port, call), Path(place) / f"{rank}.pt")


def _alone(rank: int, world: int, place: str, port: int, call: Callable[[], Any]) -> Any:
    return call()


def _in_group(rank: int, world: int, place: str, port: int, call: Callable[[], Any]) -> Any:
    dist.init_process_group(
        "gloo", f"file://{place}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        return call()
    finally:
        end_group()


def _in_environment(rank: int, world: int, place: str, port: int, call: Callable[[], Any]) -> Any:
    os.environ.update(torchrun_environment(rank, world, port))
    try:
        return call()
    finally:
        if dist.is_initialized():
            end_group()
