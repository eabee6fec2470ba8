from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from lightning_cap.utilities.precision import full_float32


@contextmanager
def _by_backend(value: str) -> Iterator[None]:
    switch = torch.backends.cuda.matmul
    if not hasattr(switch, "fp32_precision"):
        pytest.skip("this torch has one global setting only")
    before = switch.fp32_precision
    switch.fp32_precision = value
    try:
        yield
    finally:
        switch.fp32_precision = before


@contextmanager
def _global(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _precision_of_cuda() -> str:
    matmul = torch.backends.cuda.matmul
    return getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_full_float32_restores_the_callers_setting(precision: str) -> None:
    with _global(precision):
        with suppress(KeyError), full_float32():
            assert _precision_of_cuda() == "ieee"
            raise KeyError
        assert _precision_of_cuda() == ("ieee" if precision == "highest" else "tf32")
        assert torch.get_float32_matmul_precision() == precision


def test_full_float32_after_the_newer_switch_was_used() -> None:
    with _by_backend("tf32"):
        with full_float32():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    with full_float32():
        pass


def test_full_float32_is_not_caught_by_autocast() -> None:
    a = torch.randn(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with full_float32():
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
