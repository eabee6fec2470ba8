"""The end of a process group."""

from __future__ import annotations

import time

import torch.distributed as dist


def end_group() -> None:
    """Destroy the group of this process.

    torch 2.6 holds the interpreter lock while it waits for gloo's thread, and hangs if that has yet to let go of a tensor of the
    last collective. Nothing tells when it has; it takes microseconds once this thread sleeps.
    """
    time.sleep(0.1)
    dist.destroy_process_group()
