"""Whoever asks is told that a kernel is compiled, and not that one is loaded."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

import lightning_cap.kernels.cpu.jit as jit
from lightning_cap.kernels.compiling import about_to_compile, telling, when_compiling

NUMBA = "from numba import njit\n\n@njit(cache=True)\ndef add(x):\n    return x + 1\n"
TRITON = """
import triton
import triton.language as tl

@triton.jit
def fill(out, value):
    tl.store(out, value)
"""


def load(path: Path, name: str) -> Any:
    """The module of a file, anew."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_inside_and_to_all() -> None:
    told: list[str] = []
    with when_compiling(lambda: told.append("a")), when_compiling(lambda: told.append("b")):
        about_to_compile()
    about_to_compile()
    assert told == ["a", "b"]


@pytest.mark.parametrize(("name", "expected"), [("lightning_cap.made_up", ["told"]), ("somebody.elses", [])])
def test_numba(tmp_path: Path, name: str, expected: list[str]) -> None:
    assert jit.kernel
    (tmp_path / "made_up.py").write_text(NUMBA)
    told: list[str] = []
    with when_compiling(lambda: told.append("told")):
        assert load(tmp_path / "made_up.py", name).add(1.0) == 2.0
        assert told == expected
        again = load(tmp_path / "made_up.py", name)
        assert again.add(2.0) == 3.0
    assert sum(again.add.stats.cache_hits.values()) == 1
    assert told == expected, "it is loaded the second time"


def test_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU that need not be there."""
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process")
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "made_up.py").write_text(TRITON)
    source = triton.compiler.ASTSource
    make_ir, told = source.make_ir, []
    for _ in range(2):
        fill = load(tmp_path / "made_up.py", "lightning_cap.made_up").fill
        with when_compiling(lambda: told.append("told")), telling(source):
            triton.compile(source(fill, {"out": "*fp32", "value": "fp32"}), target=GPUTarget("cuda", 80, 32))
    assert told == ["told"], "it is loaded the second time"
    assert source.make_ir is make_ir
