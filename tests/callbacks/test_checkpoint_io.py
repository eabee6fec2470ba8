from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_cap.callbacks.checkpoint_io import AtomicCheckpointIO
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
