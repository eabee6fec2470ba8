"""How the loops are compiled: without the interpreter lock, so that threads run them, and kept for the next process.

Constants in kernels are typed (``dtype.type(0)``), since a Python literal would turn float32 arithmetic into float64.
"""

from __future__ import annotations

from typing import Any

from numba import njit

# no "ninf": infinity marks what may not be pruned; "nnan" only where NaN cannot matter, or the checks for it would be dropped
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def _jit(fastmath: set[str]) -> Any:
    def decorate(function: Any) -> Any:
        options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder to keep compiled code in
            return njit(**options)(function)

    return decorate


kernel = _jit(_FAST)
kernel_without_nan = _jit(_FAST | {"nnan"})
