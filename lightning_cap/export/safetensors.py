"""The plain weights of a pruned model, which anyone can load without this package."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_cap.errors import ConfigError
from lightning_cap.export.records import EXPORTS, ExportRecord
from lightning_cap.export.sharded import write_sharded
from lightning_cap.sparsity.targets import Targets, require_targets
from lightning_cap.utilities.arguments import (
    require_instance,
    require_list,
    require_path,
    require_real,
    require_text,
    shown,
)
from lightning_cap.utilities.compiled import plain_module, plain_name
from lightning_cap.utilities.distributed import rank
from lightning_cap.utilities.files import atomic
from lightning_cap.utilities.records import append_record
from lightning_cap.utilities.sharded import any_sharded, reshard


def goal_stem(goal: float, name: str) -> str:
    """File stem of a goal: ``sparsity=0.50`` or ``flops=0.50``, with more digits where two do not tell it.

    Raises:
        ConfigError: ``goal`` is no number in [0, 1], or ``name`` no text.
    """
    require_real("goal", goal, "[0, 1]", example=0.5)
    require_text("name", name, "flops")
    short = f"{goal:.2f}"
    return f"{name}={short if float(short) == goal else f'{goal:.6g}'}"


def save_weights(
    module: nn.Module, targets: Targets, path: Path | str, *, sparsity: float, goal: float
) -> ExportRecord:
    """Write the model inside a LightningModule, under its own names, and add the record to ``exports.jsonl`` beside it.

    Call it on rank 0 alone; of a model that `fully_shard` has shared out on every rank, of which rank 0 writes one tensor after the
    other.

    Args:
        module: The LightningModule.
        targets: Its pruned weights.
        path: The ``.safetensors`` file.
        sparsity: Share of zeros that the targets have; kept in the file's header.
        goal: Sparsity that was asked for; kept there too.

    Returns:
        The record; it takes the place of an earlier one of the same file.

    Raises:
        DataError: There is an ``exports.jsonl`` that holds something else.
        ConfigError: An argument is something else.
    """
    require_targets(targets)
    require_real("sparsity", sparsity, "[0, 1]", example=0.5)
    require_real("goal", goal, "[0, 1]", example=0.5)
    path = _file(path)
    model, _ = plain_model(module, list(targets))
    reshard(model)
    values = {plain_name(name): value for name, value in model.state_dict().items()}
    state = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    architecture = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", ""))
    metadata = {"architecture": architecture, "sparsity": f"{sparsity:.6f}", "goal": f"{goal:g}"}
    if any_sharded(state):
        write_sharded(path, state, metadata)
    else:
        save_plain_weights(path, state, metadata)
    record = ExportRecord(
        format="safetensors",
        path=path.name,
        goal=goal,
        sparsity=sparsity,
        architecture=architecture,
        bytes=path.stat().st_size if rank() == 0 else 0,
    )
    if rank() == 0:
        append_record(path.with_name(EXPORTS), record, lambda old: old.path == record.path)
    return record


def save_plain_weights(path: Path | str, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state dict that anyone can load without this package; the same one gives the same bytes.

    Args:
        path: The ``.safetensors`` file.
        state: Tensors by the model's own names; copied to the CPU, tied ones written twice.
        metadata: Strings for the file's header.

    Raises:
        ConfigError: ``path`` is a folder or no path, or ``state`` or ``metadata`` something else.
        OSError: The system refuses, as on a full disk; it names the file.
    """
    path = _file(path)
    check_plain_weights(state, metadata)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    with atomic(path) as temporary:
        with _as_os_error():
            save_file(tensors, temporary, {"format": "pt", **metadata})
        _sort_metadata(temporary)
        temporary.chmod(0o666 & ~_umask())  # safetensors writes for the owner alone


def check_plain_weights(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Refuse what a file of safetensors cannot hold.

    Raises:
        ConfigError: ``state`` has other things than dense tensors by name, or ``metadata`` other things than strings.
    """
    require_instance("state", state, Mapping, "model.state_dict()")
    require_instance("metadata", metadata, Mapping, '{"sparsity": "0.5"}')
    for name, tensor in state.items():
        dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type != "meta"
        if not isinstance(name, str) or not dense:
            raise ConfigError(
                f"state: {shown(name)} is {shown(tensor)}. Give dense tensors by name, such as model.state_dict()."
            )
    for name, text in metadata.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise ConfigError(
                f"metadata: {shown(name)} is {shown(text)}. Give strings by name, such as {{'sparsity': '0.5'}}."
            )


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What the system refuses to safetensors, as Python tells it."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def _file(path: object) -> Path:
    """A path that is no folder."""
    require_path("path", path, "model.safetensors")
    file = Path(cast("str | os.PathLike[str]", path))
    if file.is_dir():
        raise ConfigError(
            f"path={shown(path)}: this is a folder. Give the name of a file in it, such as model.safetensors."
        )
    return file


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a file in order, in place: safetensors writes them in another one in every process."""
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))  # as long as before


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def plain_model(module: nn.Module, target_names: list[str]) -> tuple[nn.Module, str]:
    """The model that a user would load, inside a LightningModule, and its name prefix there.

    A timm model that holds all targets; else the only child that holds all parameters; else the module itself.

    Raises:
        ConfigError: An argument is something else.
    """
    require_instance("module", module, nn.Module, "the LightningModule")
    require_list("target_names", target_names, "list(targets)")
    candidates = [(name, child) for name, child in module.named_modules() if hasattr(child, "pretrained_cfg")]
    children = [(name, child) for name, child in module.named_children() if next(child.parameters(), None) is not None]
    if len(children) == 1 and not any(True for _ in module.parameters(recurse=False)):
        candidates += children
    for name, child in candidates:
        prefix = f"{name}." if name else ""
        if all(target.startswith(plain_name(prefix)) for target in target_names):
            return plain_module(child), prefix
    return module, ""
