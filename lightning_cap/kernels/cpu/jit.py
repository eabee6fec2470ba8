"""How the loops are compiled: without the interpreter lock, so that threads run them, and kept for the next process.

Constants in kernels are typed (``dtype.type(0)``), since a Python literal would turn float32 arithmetic into float64.

numba keeps compiled code by the date or the content of a function's own file, and a kernel takes in others from other files. So the
files of its cache bear the checksum of all sources here in their names: after an edit they are other files. Nothing stale can
be loaded, whatever other processes do, and nothing has to be locked.
"""

from __future__ import annotations

import functools
import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import event

from lightning_cap.kernels.compiling import about_to_compile

# no "ninf": infinity marks what may not be pruned; "nnan" only where NaN cannot matter, or the checks for it would be dropped
_FAST = {"reassoc", "contract", "nsz", "arcp"}


@functools.cache
def sources_checksum() -> str:
    """Of the names and contents of all Python files in this folder."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(repr([(file.name, file.read_bytes()) for file in files]).encode()).hexdigest()[:16]


def _jit(fastmath: set[str]) -> Any:
    def decorate(function: Any) -> Any:
        options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}
        name = function.__qualname__
        try:
            function.__qualname__ = f"{name}.{sources_checksum()}"  # numba names the files of the cache by it
            compiled = njit(cache=True, **options)(function)
        except RuntimeError:  # no folder to keep compiled code in
            return njit(**options)(function)
        finally:
            function.__qualname__ = name
        if hasattr(compiled, "stats"):  # not with NUMBA_DISABLE_JIT
            _remove_stale(Path(compiled.stats.cache_path))
        return compiled

    return decorate


@functools.cache
def _remove_stale(cache: Path) -> None:
    """Remove the compiled code of other sources, once in a process. Nobody loads it any more: only its room is won."""
    for file in cache.iterdir():
        if file.suffix in (".nbi", ".nbc") and sources_checksum() not in file.name:
            with suppress(OSError):  # another process has removed it, or it is not ours to remove
                file.unlink()


class _Listener(event.Listener):
    """Hears of what numba compiles; what it loads from its cache is no such event."""

    def on_start(self, event: Any) -> None:
        function = getattr(event.data.get("dispatcher"), "py_func", None)
        if getattr(function, "__module__", "").startswith("lightning_cap."):
            about_to_compile()

    def on_end(self, event: Any) -> None:
        """Nobody asks for that."""


event.register("numba:compile", _Listener())

kernel = _jit(_FAST)
kernel_without_nan = _jit(_FAST | {"nnan"})
