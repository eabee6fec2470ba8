"""The plain weights of a pruned model, which anyone can load without this package."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_cap.export.records import EXPORTS, ExportRecord
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.compiled import plain_module, plain_name
from lightning_cap.utilities.files import atomic
from lightning_cap.utilities.records import append_record


def sparsity_stem(sparsity: float) -> str:
    """File stem of a sparsity: ``sparsity=0.50``, with more digits where two do not tell it."""
    short = f"{sparsity:.2f}"
    return f"sparsity={short if float(short) == sparsity else f'{sparsity:.6g}'}"


def save_weights(module: nn.Module, targets: Targets, path: Path, *, sparsity: float, goal: float) -> ExportRecord:
    """Write the model inside a LightningModule, under its own names, and add the record to ``exports.jsonl`` beside it.

    Call it on rank 0 alone.

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
    """
    model, _ = plain_model(module, list(targets))
    state = {plain_name(name): value for name, value in model.state_dict().items()}
    architecture = str((getattr(model, "pretrained_cfg", None) or {}).get("architecture", ""))
    save_plain_weights(
        path,
        {name: value for name, value in state.items() if isinstance(value, torch.Tensor)},
        {"architecture": architecture, "sparsity": f"{sparsity:.6f}", "goal": f"{goal:g}"},
    )
    record = ExportRecord(
        format="safetensors",
        path=path.name,
        goal=goal,
        sparsity=sparsity,
        architecture=architecture,
        bytes=path.stat().st_size,
    )
    append_record(path.with_name(EXPORTS), record, lambda old: old.path == record.path)
    return record


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
        if all(target.startswith(plain_name(prefix)) for target in target_names):
            return plain_module(child), prefix
    return module, ""
