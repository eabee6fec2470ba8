"""Lets `torch.func.vmap` batch what it has no rule for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_cap.calibration.normalization import PlainNormalization


@contextmanager
def vmap_friendly() -> Iterator[None]:
    """Plain attention instead of fused kernels, which vmap would loop over, and plain normalization."""
    with sdpa_kernel(SDPBackend.MATH), PlainNormalization():
        yield
