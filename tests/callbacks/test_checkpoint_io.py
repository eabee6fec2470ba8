from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO

import lightning_cap.callbacks.checkpoint_io as checkpoint_io
from lightning_cap.callbacks.checkpoint_io import AtomicCheckpointIO, make_checkpoints_atomic
from lightning_cap.callbacks.run_log import RunLog
from tests.support.toy import Toy, callback, loaders, trainer


def test_how_checkpoints_are_written(tmp_path: Path) -> None:
    """Ours takes the place of Lightning's, not of one that the user has chosen; remote paths are left to Lightning."""

    class Mine(TorchCheckpointIO):
        pass

    for plugins, kind in ((None, AtomicCheckpointIO), (Mine(), Mine)):
        t = trainer(tmp_path, callback({0: 0.5}, dirpath=str(tmp_path)), max_epochs=1, plugins=plugins)
        t.fit(Toy(), **loaders())
        assert type(t.strategy.checkpoint_io) is kind
    AtomicCheckpointIO().save_checkpoint({"x": 1}, "memory://folder/a.ckpt")
    assert AtomicCheckpointIO().load_checkpoint("memory://folder/a.ckpt") == {"x": 1}
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", storage_options={})


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, full_disk: Callable[[], None]) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.tensor(1.0)}, path)
    before = path.read_bytes()
    full_disk()
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"x": torch.tensor(2.0)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def asynchronous(folder: Path) -> AsyncCheckpointIO:
    """The plugin of a Trainer with our callback, as it is from setup on."""
    plugin = AsyncCheckpointIO()
    make_checkpoints_atomic(trainer(folder, plugins=plugin))
    return plugin


def test_an_asynchronous_checkpoint_is_whole_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, goes_on, save = tmp_path / "old.ckpt", tmp_path / "new.ckpt", threading.Event(), checkpoint_io._save
    plugin = asynchronous(tmp_path)
    plugin.save_checkpoint({"x": 1}, old)
    plugin.teardown()

    def half_and_wait(checkpoint: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        goes_on.wait(60)
        save(checkpoint, path)

    monkeypatch.setattr(checkpoint_io, "_save", half_and_wait)
    plugin.save_checkpoint({"x": 2}, new)
    plugin.remove_checkpoint(old)
    assert list(tmp_path.glob("*.ckpt")) == [old], "what a kill would leave now"
    goes_on.set()
    plugin.teardown()
    assert list(tmp_path.glob("*.ckpt")) == [new]
    assert plugin.load_checkpoint(new, weights_only=False) == {"x": 2}


def test_an_asynchronous_checkpoint_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = asynchronous(tmp_path)
    plugin.save_checkpoint({"x": 1}, tmp_path / "old.ckpt")
    plugin.teardown()

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_io, "_save", fail)
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012 - Lightning tells it as soon as it knows
        plugin.save_checkpoint({"x": 2}, tmp_path / "new.ckpt")
        plugin.remove_checkpoint(tmp_path / "old.ckpt")
        plugin.teardown()
    with suppress(OSError):  # the same
        plugin.remove_checkpoint(tmp_path / "old.ckpt")
    with suppress(OSError):
        plugin.teardown()
    assert [path.name for path in tmp_path.iterdir()] == ["old.ckpt"]


def test_checkpoints_of_cycles_are_there_when_records_name_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    keep = RunLog.keep

    def look(self: RunLog, history: Any, metric: Any) -> None:
        seen.extend(Path(record.checkpoint).exists() for record in history if record.checkpoint)
        keep(self, history, metric)

    monkeypatch.setattr(RunLog, "keep", look)
    save = checkpoint_io._save
    monkeypatch.setattr(checkpoint_io, "_save", lambda *args: (time.sleep(0.2), save(*args)))
    t = trainer(tmp_path, callback({0: 0.5}, dirpath=str(tmp_path)), max_epochs=1, plugins=AsyncCheckpointIO())
    t.fit(Toy(), **loaders())
    assert type(t.strategy.checkpoint_io) is AsyncCheckpointIO
    assert seen
    assert all(seen)
