"""Checkpoints that cannot be loaded, and paths that lead to none."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lightning_cap.errors import CAPError, DataError
from lightning_cap.trainer.checkpoints import check_checkpoint
from lightning_cap.utilities.arguments import shown
from tests.support.bad_input.table import Line, wrong
from tests.support.checkpoints import RunsCode, checkpoint


def _bytes(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def _saved(content: Any, **how: Any) -> Callable[[Path], Any]:
    return lambda path: torch.save(content, path, **how)


def _cut(keep: float) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        torch.save(checkpoint(), path)
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])

    return make


def _flipped(path: Path) -> None:
    """A checkpoint with its pickled part damaged."""
    torch.save(checkpoint(), path)
    content = bytearray(path.read_bytes())
    at = content.index(b"state_dict")
    content[at - 8 : at + 2] = b"\xff" * 10
    path.write_bytes(content)


def _folder(*names: str) -> Callable[[Path], Any]:
    def make(path: Path) -> None:
        path.mkdir()
        for name in names:
            (path / name).write_bytes(b"")

    return make


def _line(
    name: str, make: Callable[[Path], Any], *words: str, file: str = "x.ckpt", error: type[CAPError] = DataError
) -> Line:
    """A file or folder that is made, and given as ``ckpt_path``."""

    def run(_: Path) -> None:
        check_checkpoint(file)  # in the working directory

    def prepare(folder: Path) -> None:
        make(folder / file)

    return Line(f"check_checkpoint: {name}", run, error, (f"ckpt_path={shown(file)}", *words), prepare)


_NO_CHECKPOINT = "no Lightning checkpoint"
_WITHOUT_VERSION = {name: value for name, value in checkpoint().items() if name != "pytorch-lightning_version"}

LINES = [
    *wrong(
        check_checkpoint,
        "path",
        5,
        True,
        1.5,
        ["a.ckpt"],
        {"a": 1},
        object,
        "",
        " ",
        b"a.ckpt",
        given={"argument": "path"},
    ),
    _line("nothing there", lambda path: None, "No such file"),
    _line("a folder", _folder(), "this is a folder"),
    _line("a folder with checkpoints", _folder("a.ckpt", "b.ckpt"), "'b.ckpt'"),
    _line("a sharded checkpoint", _folder("meta.pt"), "consolidate_checkpoint"),
    _line("a file as a folder", lambda path: path.parent.write_bytes(b""), "Not a directory", file="x/y.ckpt"),
    _line("too long a name", lambda path: None, "File name too long", file="y" * 300),
    _line("a zero byte", lambda path: None, "null", file="\0"),
    _line("a pipe", os.mkfifo, "no regular file"),
    _line("empty", _bytes(b""), "empty"),
    _line("text", _bytes(b"hello"), "no file that torch has saved"),
    _line("YAML", _bytes(b"model: {}\n"), "no file that torch has saved", file="config.yaml"),
    _line("one byte", _bytes(b"\x80"), "damaged"),
    _line("zeros", _bytes(bytes(5000)), "no file that torch has saved"),
    _line("safetensors", lambda path: save_file({"a": torch.ones(2)}, path), "plain weights", file="x.safetensors"),
    _line("another zip", _bytes(b"PK\x03\x04" + bytes(200)), "damaged"),
    _line("cut in the middle", _cut(0.5), "damaged"),
    _line("cut at the end", _cut(0.99), "damaged"),
    _line("flipped bytes", _flipped, "damaged"),
    _line("a number", _saved(5), "one int", _NO_CHECKPOINT),
    _line("a tensor", _saved(torch.ones(3)), "one Tensor", _NO_CHECKPOINT),
    _line("a list", _saved([checkpoint()]), "one list", _NO_CHECKPOINT),
    _line("plain weights", _saved({"a": torch.ones(3)}), _NO_CHECKPOINT, "'a'", "VisionClassifier(checkpoint=...)"),
    _line("an empty dict", _saved({}), _NO_CHECKPOINT, "[]"),
    _line("of timm", _saved({"model": {}, "epoch": 3}), _NO_CHECKPOINT, "'model'"),
    _line("without version", _saved(_WITHOUT_VERSION), _NO_CHECKPOINT),
    *(
        _line(f"version {v!r}", _saved(checkpoint(**{"pytorch-lightning_version": v})), _NO_CHECKPOINT)
        for v in ("new", 2, "", "2")
    ),
    _line("a number for weights", _saved({**checkpoint(), "state_dict": 3}), _NO_CHECKPOINT),
    _line("a pickle that runs code", _bytes(pickle.dumps(RunsCode())), "not loaded"),
    _line("a checkpoint that runs code", _saved({**checkpoint(), "x": RunsCode()}), "system", "could run code"),
    _line(
        "an old one that runs code",
        _saved({**checkpoint(), "x": RunsCode()}, _use_new_zipfile_serialization=False),
        "not loaded",
    ),
    _line("of a whole module", _saved(torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"),
]
