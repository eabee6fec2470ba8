"""Compiled code that is kept for the next process: never that of other sources."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lightning_cap.kernels import compiling
from lightning_cap.kernels.cpu import jit
from lightning_cap.kernels.cpu.isotonic import pool_rows
from tests.support import ROOT, kept_code
from tests.support.kept_code import Process, accumulate_blocks

LOW = "from lightning_cap.kernels.cpu.jit import kernel\n\n@kernel\ndef low(x):\n    return x + {}\n"
HIGH = """
from lightning_cap.kernels.cpu.jit import kernel
from lightning_cap.kernels.cpu.low import low

@kernel
def high(x):
    return 100 * low(x)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A package with our ``jit.py``, and one kernel that takes in another from a second file."""
    cpu = tmp_path / "package/lightning_cap/kernels/cpu"
    cpu.mkdir(parents=True)
    for package in (cpu, *list(cpu.parents)[:2]):
        (package / "__init__.py").touch()
    shutil.copy(jit.__file__, cpu)
    shutil.copy(compiling.__file__, cpu.parent)
    (cpu / "low.py").write_text(LOW.format(1))
    (cpu / "high.py").write_text(HIGH)
    return cpu


def compiled_in(cache: Path | None) -> set[str]:
    assert cache is not None
    return {path.name for path in cache.iterdir() if path.suffix in (".nbi", ".nbc")}


def edit(path: Path, old: str, new: str) -> None:
    """With the date and the size as they were."""
    text, before = path.read_text(), path.stat()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_an_edit_of_another_file_is_seen_and_leaves_nothing_stale(folder: Path, home: Path) -> None:
    found = [kept_code.run(folder, home) for _ in range(2)]
    assert [(each.value, each.hits) for each in found] == [(200.0, 0), (200.0, 1)]
    assert found[0].cache == folder / "__pycache__"
    before = compiled_in(found[0].cache)
    edit(folder / "low.py", "x + 1", "x + 5")
    found = [kept_code.run(folder, home) for _ in range(2)]
    assert [(each.value, each.hits) for each in found] == [(600.0, 0), (600.0, 1)]
    assert not before & compiled_in(found[0].cache)
    assert len(before) == len(compiled_in(found[0].cache)) == 4  # an index and the code of each


@pytest.mark.slow
def test_numba_alone_would_not_see_it(folder: Path, home: Path) -> None:
    """What `jit.py` is for: if this fails, numba has learnt it."""
    (folder / "jit.py").write_text("from numba import njit\n\nkernel = njit(cache=True)\n")
    assert kept_code.run(folder, home).value == 200.0
    (folder / "low.py").write_text(LOW.format(50))
    assert kept_code.run(folder, home).value == 200.0


@pytest.mark.slow
def test_an_edit_of_the_tile_is_seen_by_the_kernels(tmp_path: Path, home: Path) -> None:
    package = tmp_path / "package/lightning_cap"
    shutil.copytree(ROOT / "lightning_cap/kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").touch()
    cpu = package / "kernels/cpu"
    assert kept_code.run(cpu, home, accumulate_blocks).value == 9.0
    edit(cpu / "gram.py", "builder.fadd(before, value)", "builder.fsub(before, value)")
    assert kept_code.run(cpu, home, accumulate_blocks).value == -9.0


@pytest.mark.slow
def test_a_package_that_cannot_be_written_to_has_its_cache_elsewhere(folder: Path, home: Path) -> None:
    (folder / "__pycache__").touch()  # a file: not even root can keep anything in it
    for number, value in ((1, 200.0), (7, 800.0)):
        (folder / "low.py").write_text(LOW.format(number))
        found = [kept_code.run(folder, home) for _ in range(2)]
        assert [(each.value, each.hits) for each in found] == [(value, 0), (value, 1)]
        assert found[0].cache is not None
        assert home in found[0].cache.parents
        assert len(compiled_in(found[0].cache)) == 4


@pytest.mark.slow
def test_without_any_place_for_a_cache_each_process_compiles(folder: Path, home: Path) -> None:
    (folder / "__pycache__").touch()
    home.touch()
    for number, value in ((1, 200.0), (7, 800.0)):
        (folder / "low.py").write_text(LOW.format(number))
        found = kept_code.run(folder, home)
        assert (found.value, found.hits, found.cache) == (value, 0, None)


def test_many_processes_at_once(folder: Path, home: Path) -> None:
    kept_code.run(folder, home)
    (folder / "low.py").write_text(LOW.format(31))
    processes = [Process(folder, home) for _ in range(4)]
    for process in processes:
        process.compute()
    assert [process.result().value for process in processes] == [3200.0] * 4
    found = kept_code.run(folder, home)
    assert (found.value, found.hits) == (3200.0, 1)
    assert len(compiled_in(found.cache)) == 4


@pytest.mark.slow
def test_a_process_from_before_an_edit_leaves_nothing_that_is_loaded_after_it(folder: Path, home: Path) -> None:
    old = Process(folder, home)
    (folder / "low.py").write_text(LOW.format(41))
    new = kept_code.run(folder, home)
    old.compute()
    assert (new.value, old.result().value) == (4200.0, 200.0)
    again = kept_code.run(folder, home)
    assert (again.value, again.hits) == (4200.0, 1)


def test_the_checksum_is_in_the_files_names_and_not_in_the_kernels() -> None:
    values = np.zeros((1, 2), np.float32)
    pool_rows(values, values.copy(), 0, 1)
    own = [name for name in compiled_in(Path(pool_rows.stats.cache_path)) if name.startswith("isotonic.pool_rows")]
    assert own
    assert all(f".{jit.sources_checksum()}-" in name for name in own)
    assert pool_rows.py_func.__qualname__ == "pool_rows"
