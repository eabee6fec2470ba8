"""Random state: capture, restore, and seed by a key."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np
import torch


class Domain(IntEnum):
    """What random numbers are drawn for; a part of the key, so that no two uses share a stream."""

    DRAW = 0
    SAMPLE = 1
    COLLATE = 2
    STREAM = 3
    COMPUTE = 4
    PRUNER = 5
    HEAL = 6
    BATCH_NORM = 7
    CHOICE = 8


def capture() -> dict[str, Any]:
    """The state of Python's, NumPy's, torch's and every CUDA generator, as tensors and plain Python values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def restore(state: dict[str, Any]) -> None:
    """Set every generator to a captured state. CUDA states are set on as many devices as there are here."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
    keys = numpy["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state.cpu(), device)


@contextmanager
def preserved() -> Iterator[None]:
    """Leave every generator as it was, whatever happens inside."""
    state = capture()
    try:
        yield
    finally:
        restore(state)


def seed_by(*key: int) -> None:
    """Seed Python, NumPy and torch from a key of non-negative integers, such as (seed, event, global index)."""
    a, b, c = (int(word) for word in np.random.SeedSequence(key).generate_state(3, np.uint64))
    random.seed(a)
    np.random.seed(b % 2**32)
    if torch.cuda.is_initialized() or torch.backends.mps.is_available():
        torch.manual_seed(c >> 1)
    else:  # torch would note the call for a CUDA that may come, with a stack trace: milliseconds for every sample
        torch.default_generator.manual_seed(c >> 1)
