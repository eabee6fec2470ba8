"""Processes that compile the kernels of a folder, or load what another has compiled."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass
class Found:
    """What a process computed, how often compiled code was taken from the cache, and the folder of the cache."""

    value: float
    hits: int
    cache: Path | None


def high(kernel: Any) -> float:
    """The result of a kernel that takes in another from a second file."""
    return float(kernel(1.0))


def accumulate_blocks(kernel: Any) -> float:
    """The result of a real kernel, which takes in the tile."""
    packed, rows = np.zeros((1, 1), np.float32), np.full((1, 1, 1), 3, np.float32)
    kernel(packed, rows, 0, 1)
    return float(packed[0, 0])


class Process:
    """A new process, which has imported the kernels of a folder and not compiled them yet.

    Args:
        folder: ``lightning_cap/kernels/cpu`` somewhere.
        home: Where the user's own caches are.
        compute: `high` or `accumulate_blocks`.
    """

    def __init__(self, folder: Path, home: Path, compute: Callable[[Any], float] = high) -> None:
        self._here, there = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_work, args=(there, folder, home, compute))
        self._process.start()
        there.close()
        assert self._here.recv() == "imported"

    def compute(self) -> None:
        """Let it compute."""
        self._here.send("compute")

    def result(self) -> Found:
        """Wait for it."""
        found: Found = self._here.recv()
        self._process.join()
        return found


def run(folder: Path, home: Path, compute: Callable[[Any], float] = high) -> Found:
    """The result of one process."""
    process = Process(folder, home, compute)
    process.compute()
    return process.result()


def _work(pipe: Connection, folder: Path, home: Path, compute: Callable[[Any], float]) -> None:
    import numba

    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning_cap"]:
        del sys.modules[name]  # what the server of processes may have imported
    numba.config.CACHE_DIR = ""
    os.environ.update(HOME=str(home), XDG_CACHE_HOME=str(home))
    sys.dont_write_bytecode = True  # Python goes by date and size, which an edit may leave as they are
    sys.path.insert(0, str(folder.parents[2]))
    name = "high" if compute is high else "packed"
    module = importlib.import_module(f"lightning_cap.kernels.cpu.{name}")
    assert str(module.__file__) == str(folder / f"{name}.py")
    kernel = getattr(module, compute.__name__)
    pipe.send("imported")
    pipe.recv()
    value = compute(kernel)
    cache = kernel.stats.cache_path
    pipe.send(Found(value, sum(kernel.stats.cache_hits.values()), None if cache is None else Path(cache)))
