from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lightning_cap.utilities.files as files
from lightning_cap.errors import ConfigError
from lightning_cap.utilities.files import atomic, remove_folder, require_writable, save_json
from tests.support.processes import FORKED


def test_atomic_leaves_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with suppress(KeyError), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert list(path.parent.iterdir()) == []
    with atomic(path) as temporary:
        temporary.write_text("first")
    with suppress(KeyError), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_json(tmp_path: Path) -> None:
    save_json(tmp_path / "r.json", [1, {"a": None}])
    assert json.loads((tmp_path / "r.json").read_text()) == [1, {"a": None}]
    with pytest.raises(TypeError):
        save_json(tmp_path / "r.json", object())
    assert json.loads((tmp_path / "r.json").read_text()) == [1, {"a": None}]


def hold(folder: Path, seconds: float) -> None:
    with atomic(folder / "held.json") as temporary:
        save_file({"x": torch.ones(3)}, temporary)  # as all that is written here, into the same file
        (folder / "ready").touch()
        time.sleep(seconds)


def start(folder: Path, seconds: float) -> Any:
    process = FORKED.Process(target=hold, args=(folder, seconds))
    process.start()
    while not (folder / "ready").exists():
        time.sleep(0.01)
    return process


def test_temporary_files_of_killed_processes_are_removed_by_the_next_writing(tmp_path: Path) -> None:
    killed = start(tmp_path, 600)
    killed.kill()
    killed.join()
    (tmp_path / ".mine.tmp").touch()
    assert len(list(tmp_path.glob(".held.json.*.tmp"))) == 1
    save_json(tmp_path / "another.json", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"another.json", ".mine.tmp", "ready"}


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    writer = start(tmp_path, 1.0)
    save_json(tmp_path / "another.json", 1)
    assert len(list(tmp_path.glob(".held.json.*.tmp"))) == 1
    writer.join()
    assert (writer.exitcode, (tmp_path / "held.json").exists()) == (0, True)


def test_without_locks_a_file_is_abandoned_when_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    old, new = (tmp_path / f".{name}.tmp" for name in ("a[1].json.11111111", "a[1].json.22222222"))
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (0, 0))
    save_json(tmp_path / "a[1].json", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].json", new.name}


def test_a_full_disk_names_the_file(tmp_path: Path, full_disk: Callable[[], None]) -> None:
    full_disk()
    with pytest.raises(OSError, match=r"No space left on device: '.*r\.json'"):
        save_json(tmp_path / "r.json", 1)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file/deeper", tmp_path / ("x" * 300), Path("/proc/nothing/here")):
        with pytest.raises(ConfigError, match=r"dirpath='given': .* cannot be written to"):
            require_writable("dirpath", "given", folder)
    require_writable("dirpath", "given", tmp_path / "a/b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with atomic(tmp_path / "model") as temporary:
            (temporary / "inside").mkdir(parents=True)
            (temporary / "inside" / content).write_text(content)
    with suppress(RuntimeError), atomic(tmp_path / "model") as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "model", "model/inside", "model/inside/second",
    ]  # fmt: skip


class Killed(BaseException):
    """Ends the process at once, as far as a test can."""


def write_folder(path: Path, content: str) -> None:
    with atomic(path) as temporary:
        temporary.mkdir()
        (temporary / content).touch()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot exchange two folders")
def test_a_folder_is_never_without_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "model", "first")
    monkeypatch.setattr(files.os, "replace", lambda *_: pytest.fail("between two renamings there is no folder"))
    write_folder(tmp_path / "model", "second")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_where_folders_cannot_be_exchanged_the_next_writing_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "model", "first")
    replace, calls = os.replace, []

    def killed(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) >= 2:  # who is killed does nothing more
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(files, "_exchange", lambda *_: False)
        patch.setattr(files.os, "replace", killed)
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
        write_folder(tmp_path / "model", "second")
    assert not (tmp_path / "model").exists()
    save_json(tmp_path / "other.json", {})
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["second"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other.json"]
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    write_folder(tmp_path / "model", "third")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["third"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "model", "first")
    replace, calls = os.replace, []

    def fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_exchange", lambda *_: False)
        patch.setattr(files.os, "replace", fails)
        with pytest.raises(OSError, match="Input/output error"):
            write_folder(tmp_path / "model", "second")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_removed_is_whole_or_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "a", "inside")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *_, **__: None)  # as if killed before
        remove_folder(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    write_folder(tmp_path / "b", "inside")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    remove_folder(tmp_path / "b")
    assert not list(tmp_path.iterdir())
