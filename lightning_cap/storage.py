"""Files that are complete or absent: plain safetensors of a pruned model, JSON lines of events."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to ``path`` when the body has succeeded and removed if it has not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_plain_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state dict that anyone can load without this package.

    Args:
        path: The ``.safetensors`` file.
        state: Tensors by the model's own names; copied to the CPU, tied ones written twice.
        metadata: Strings for the file's header.
    """
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", **metadata})
        temporary.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def plain_model(module: nn.Module, target_names: list[str]) -> tuple[nn.Module, str]:
    """The model that a user would load, inside a LightningModule, and its name prefix there.

    A timm model that holds all targets; else the only child that holds all parameters; else the module itself.
    """
    candidates = [(name, child) for name, child in module.named_modules() if hasattr(child, "pretrained_cfg")]
    children = [(name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None]
    if len(children) == 1 and not any(True for _ in module.parameters(recurse=False)):
        candidates += children
    for name, child in candidates:
        prefix = f"{name}." if name else ""
        if all(target.startswith(prefix.replace("_orig_mod.", "")) for target in target_names):
            return getattr(child, "_orig_mod", child), prefix
    return module, ""


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one record as a line of JSON, flushed to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def save_json(path: Path, value: Any) -> None:
    """Write a JSON file in one piece."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
