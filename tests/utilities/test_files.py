from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

from lightning_cap.utilities.files import atomic, save_json


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


def test_abandoned_temporary_files_are_removed_by_the_next_writing(tmp_path: Path) -> None:
    old, new, other = (tmp_path / f".{name}.tmp" for name in ("a[1].json.11111111", "a[1].json.22222222", "b.json.1"))
    for path in (old, new, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (0, 0))
    save_json(tmp_path / "a[1].json", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].json", new.name, other.name}
