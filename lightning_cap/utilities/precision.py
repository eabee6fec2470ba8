"""The precision of matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_float32(allow_tf32: bool = False) -> Iterator[None]:
    """Float32 matrix products at full precision inside (no bf16 or autocast, and no TF32 unless allowed), the caller's
    settings restored after."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_products(allow_tf32))
        yield


@contextmanager
def _products(allow_tf32: bool) -> Iterator[None]:
    switches = _precision_switches()
    before = [switch.fp32_precision for switch in switches]
    legacy = None if switches else torch.get_float32_matmul_precision()  # would raise where both ways are mixed
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if allow_tf32 and switch is torch.backends.cuda.matmul else "ieee"
        if legacy is not None:
            torch.set_float32_matmul_precision("high" if allow_tf32 else "highest")
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)


def _precision_switches() -> list[Any]:
    """The settings of each backend in releases of torch that have them; one global setting serves the others."""
    found = [getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    return found if all(hasattr(switch, "fp32_precision") for switch in found) else []
