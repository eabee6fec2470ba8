from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lightning_cap.callbacks.checkpoint_io import AtomicCheckpointIO
from lightning_cap.callbacks.cycle import CycleRecord
from lightning_cap.export.safetensors import plain_model, save_plain_weights
from lightning_cap.utilities.files import atomic, save_json
from lightning_cap.utilities.records import append_record
from tests.support.toy import Toy, callback, loaders, trainer


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


def test_plain_weights_hold_tied_strided_and_half_tensors(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    state = {"a": base, "tied": base, "strided": base.t(), "half": base.bfloat16(), "count": torch.tensor(3)}
    save_plain_weights(tmp_path / "w.safetensors", state, {"sparsity": "0.5"})
    loaded = load_file(tmp_path / "w.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], state[k]) and loaded[k].dtype == state[k].dtype for k in state)
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "sparsity": "0.5"}


def test_saved_timm_model_loads_as_a_plain_one(tmp_path: Path, tiny_vit: nn.Module) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.net = tiny_vit

    model, prefix = plain_model(Wrapper(), ["net.blocks.0.attn.qkv.weight"])
    assert (model is tiny_vit, prefix) == (True, "net.")
    path = tmp_path / "vit.safetensors"
    save_plain_weights(path, model.state_dict(), {})
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    again = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(path), **options)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(x), tiny_vit.eval()(x))


def test_plain_model_of_other_modules() -> None:
    only = nn.ModuleDict({"body": nn.Linear(2, 2), "loss": nn.CrossEntropyLoss()})
    assert plain_model(only, ["body.weight"]) == (only["body"], "body.")
    two = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert plain_model(two, ["body.weight"]) == (two, "")
    compiled = nn.ModuleDict({"net": torch.compile(nn.Linear(2, 2))})
    model, prefix = plain_model(compiled, ["net.weight"])
    assert list(model.state_dict()) == ["weight", "bias"]
    assert prefix == "net."


def test_json(tmp_path: Path) -> None:
    save_json(tmp_path / "r.json", [1, {"a": None}])
    assert json.loads((tmp_path / "r.json").read_text()) == [1, {"a": None}]
    with pytest.raises(TypeError):
        save_json(tmp_path / "r.json", object())
    assert json.loads((tmp_path / "r.json").read_text()) == [1, {"a": None}]


def test_plain_weights_are_readable_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        save_plain_weights(tmp_path / "a.safetensors", {"w": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {name: tmp_path / f"a.{name}" for name in ("ckpt", "safetensors", "jsonl")}
    write: dict[str, Callable[[float], None]] = {
        "ckpt": lambda x: AtomicCheckpointIO().save_checkpoint({"x": torch.tensor(x)}, paths["ckpt"]),
        "safetensors": lambda x: save_plain_weights(paths["safetensors"], {"x": torch.tensor(x)}, {}),
        "jsonl": lambda x: append_record(paths["jsonl"], CycleRecord(x, 0, None, x), lambda old: False),
    }
    for save in write.values():
        save(1.0)
    before = {name: path.read_bytes() for name, path in paths.items()}
    monkeypatch.setattr(os, "fsync", no_space)  # where some file systems say so
    for save in write.values():
        with pytest.raises(OSError, match="No space left"):
            save(2.0)
    assert {name: path.read_bytes() for name, path in paths.items()} == before
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths.values()}


def test_abandoned_temporary_files_are_removed_by_the_next_writing(tmp_path: Path) -> None:
    old, new, other = (tmp_path / f".{name}.tmp" for name in ("a[1].json.11111111", "a[1].json.22222222", "b.json.1"))
    for path in (old, new, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (0, 0))
    save_json(tmp_path / "a[1].json", 1)
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].json", new.name, other.name}


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
