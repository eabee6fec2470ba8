"""Real gloo processes on the CPU for tests: run a function on each of several ranks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)``, a function of a module, returns on each of ``world`` ranks, in order of rank."""
    meeting = folder / f"meeting-{world}-{len(list(folder.iterdir()))}"
    mp.spawn(_main, (world, str(meeting), function, args), nprocs=world)  # raises what a rank raised
    return [torch.load(f"{meeting}-{rank}.pt", weights_only=False) for rank in range(world)]


def _main(rank: int, world: int, meeting: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        torch.save(function(*args), f"{meeting}-{rank}.pt")
    finally:
        dist.destroy_process_group()
