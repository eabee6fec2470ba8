"""A Lightning checkpoint, looked at before Lightning loads it: what is wrong with it in one line."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.errors import DataError
from lightning_cap.utilities.arguments import require_path, shown

#: What Lightning takes in place of a path, and looks up itself.
WORDS = ("best", "last", "hpc")

#: In a folder, what is neither weights nor the state of optimizers.
META = "meta.pt"

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"  # how files of torch begin: now, and before 1.6
_GIVE = "Give a .ckpt file that a Trainer has saved."
_LONGEST = 400  # characters of what does not fit


def check_checkpoint(
    path: str | os.PathLike[str] | None, argument: str = "ckpt_path", resumes: bool = False, folders: bool = False
) -> None:
    """Refuse a checkpoint that Lightning could not load. No code in it is run, and its tensors stay on the disk.

    None, the words `WORDS`, ``registry:...`` and addresses such as ``s3://...`` are left to Lightning.

    Args:
        path: The checkpoint.
        argument: Its name in messages.
        resumes: Whether training is to go on from it, which needs the state of the optimizer too.
        folders: Whether it may be one that several processes have written together (FSDP2).

    Raises:
        ConfigError: It is no path.
        DataError: There is no such file, or it is no Lightning checkpoint, or it holds objects that could run code.
    """
    require_path(argument, path, "runs/last.ckpt", optional=True)
    if path is None or os.fspath(path) in WORDS or "://" in os.fspath(path):
        return
    if os.fspath(path).lower().partition(":")[0] == "registry" and not os.path.exists(path):
        return
    named = f"{argument}={shown(os.fspath(path))}"
    if folders and is_folder(Path(path).expanduser()):
        held = {"state_dict": {}, "optimizer_states": [], **_read(Path(path).expanduser() / META, named)}
    else:
        held = _read(Path(path).expanduser(), named)
    if not isinstance(held, Mapping):
        raise DataError(f"{named}: it holds one {type(held).__name__} and is no Lightning checkpoint. {_GIVE}")
    if not isinstance(held.get("state_dict"), Mapping) or not _is_version(held.get("pytorch-lightning_version")):
        raise DataError(
            f"{named}: it is no Lightning checkpoint; it holds {shown(list(held))}. {_GIVE} Plain weights are loaded into the "
            "model itself, as by VisionClassifier(checkpoint=...)."
        )
    missing = [name for name in ("optimizer_states", "lr_schedulers", "loops") if name not in held]
    if resumes and missing:
        raise DataError(
            f"{named}: it holds no {missing[0]}, as with save_weights_only=True, so that training cannot go on from it. Give a "
            "whole checkpoint, or load these weights into the model and start anew."
        )


def is_folder(path: Path) -> bool:
    """Whether this is a checkpoint that several processes have written together (FSDP2); its last file is written when all are."""
    return (path / META).is_file() and (path / ".metadata").is_file()


@contextmanager
def naming_mismatch(path: str | os.PathLike[str] | None, argument: str = "ckpt_path") -> Iterator[None]:
    """Around the loading of a checkpoint: weights of another model are one line that says what does not fit.

    Raises:
        DataError: The model cannot take them.
    """
    try:
        yield
    except RuntimeError as error:
        first, *rest = str(error).splitlines() or [""]
        if path is None or not first.startswith("Error(s) in loading state_dict"):
            raise
        told = " ".join(" ".join(rest).split())
        told = told if len(told) <= _LONGEST else f"{told[:_LONGEST]} ..."
        raise DataError(
            f"{argument}={shown(os.fspath(path))}: it is of another model. {told} Give a checkpoint of this one."
        ) from error


def _is_version(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)+([.+-]?[a-z]+\d*)*(\+[\w.]+)?", value) is not None


def check_weights(path: str | os.PathLike[str], saved: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse weights of another model, before any of them is loaded.

    Args:
        path: The checkpoint, to be named.
        saved: Its state dict.
        model: What is to take it.

    Raises:
        DataError: Names are missing or unknown, or a shape differs.
    """
    own = model.state_dict()
    told = [
        f"{what} {shown(names[0])}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
        for what, names in (
            ("it lacks", [name for name in own if name not in saved]),
            ("it has, and the model has not,", [name for name in saved if name not in own]),
            ("of another shape is", [n for n, v in own.items() if _shape(saved.get(n, v)) != _shape(v)]),
        )
        if names
    ]
    if told:
        raise DataError(
            f"ckpt_path={shown(os.fspath(path))}: it is of another model: {'; '.join(told)}. Give a checkpoint of this one."
        )


def _shape(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _read(path: Path, named: str) -> Any:
    """What a file of torch holds; of tensors, that they are there."""
    try:
        if path.is_dir():
            raise DataError(f"{named}: this is a folder. {_in_folder(path)}")
        if path.exists() and not path.is_file():  # a pipe would keep whoever opens it waiting
            raise DataError(f"{named}: this is no regular file. {_GIVE}")
        with path.open("rb") as file:
            start = file.read(len(_ZIP))
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{named}: it cannot be read ({reason}). {_GIVE}") from error
    if start != _ZIP and not start.startswith(_PICKLE):
        raise DataError(f"{named}: {_is_what(path, start)} {_GIVE}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign files
            return torch.load(path, map_location="cpu", weights_only=True, mmap=start == _ZIP)
    except (
        Exception
    ) as error:  # a damaged file may raise whatever its bytes lead to; torch's advice is to run what is in it
        raise DataError(f"{named}: {_why(path, error)}") from None


def _in_folder(path: Path) -> str:
    if (path / META).is_file():
        tool = "python -m lightning.fabric.utilities.consolidate_checkpoint"
        return f"It is a sharded checkpoint, which fit alone takes: make one file of its weights by {tool} {path}"
    inside = sorted(file.name for file in path.glob("*.ckpt"))
    return f"Give one of the checkpoints in it, such as {shown(inside[-1])}." if inside else _GIVE


def _is_what(path: Path, start: bytes) -> str:
    if not start:
        return "the file is empty."
    if path.suffix == ".safetensors":
        return "these are plain weights; load them into the model, as by VisionClassifier(checkpoint=...)."
    return "it is no file that torch has saved."


def _why(path: Path, error: Exception) -> str:
    """Why torch did not load a file."""
    if isinstance(error, MemoryError):
        return "there is not enough memory to read it."
    try:
        held = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as above; files before torch 1.6 are not looked into
        held = []
    if held:
        return (
            f"it holds more than weights and plain values ({shown(', '.join(held))}), which could run code and is not loaded. Give "
            "a checkpoint without; a class that you know is allowed by torch.serialization.add_safe_globals([...])."
        )
    return f"it is damaged, or holds more than weights and plain values, which is not loaded. {_GIVE}"
