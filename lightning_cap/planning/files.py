"""Bytes of the files that a run writes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_cap.callbacks.pruning import CAPPruningCallback
from lightning_cap.planning.run_plan import FilePlan
from lightning_cap.sparsity.targets import Targets

_OVERHEAD = 2**16  # names and settings of a checkpoint
_RECORD = 60  # bytes of a record for each target: its name and its sparsity
_EVENT = 2_000  # of a record besides


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weight_bytes(module: nn.Module) -> int:
    """Parameters and buffers that are saved."""
    return tensor_bytes(module.state_dict().values())


def optimizer_bytes(optimizers: Iterable[Optimizer]) -> int:
    """State that optimizers will have after their first step, as one of the same kind has it for a small parameter."""
    total = 0.0
    for optimizer in optimizers:
        per_byte = _state_per_byte(optimizer)
        total += per_byte * tensor_bytes(p for group in optimizer.param_groups for p in group["params"])
    return int(total)


def _state_per_byte(optimizer: Optimizer) -> float:
    """Bytes of state for a byte of a parameter; 2, as of Adam, where another such optimizer cannot be made."""
    taken = inspect.signature(type(optimizer).__init__).parameters
    settings = {name: value for name, value in optimizer.defaults.items() if name in taken}
    small = nn.Parameter(torch.zeros(16, 16))
    small.grad = torch.zeros_like(small)
    try:
        other = type(optimizer)([small], **settings)
        other.step()
    except Exception:  # whatever a class of the user's needs
        return 2.0
    state = [v for v in other.state[small].values() if isinstance(v, Tensor) and v.numel() > 1]
    return tensor_bytes(state) / tensor_bytes([small])


def checkpoint_bytes(trainer: pl.Trainer, module: nn.Module, callbacks: Iterable[CAPPruningCallback]) -> int:
    """Of one Lightning checkpoint: weights, the optimizers' state, and the masks as bits."""
    masks = sum(-(-callback.masks[name].numel() // 8) for callback in callbacks for name in callback.masks)
    return weight_bytes(module) + optimizer_bytes(trainer.optimizers) + masks + _OVERHEAD


def cycle_files(
    callback: CAPPruningCallback, goals: Mapping[int, float], checkpoint: int, weights: int, name: str, targets: Targets
) -> list[FilePlan]:
    """What a pruning callback leaves: files of each goal, and the records.

    Args:
        callback: Of the run.
        goals: Epoch -> goal of its events.
        checkpoint: Bytes of one.
        weights: Bytes of the plain weights.
        name: What goals count.
        targets: What is pruned.
    """
    if callback.save == "none":
        return []
    wanted = callback.save_sparsities
    found = goals if callback.schedule.adapts else set(goals.values())  # one each, where they are not known yet
    saved = [goal for goal in found if wanted is None or goal in wanted]
    each = len(saved) * (2 if callback.save == "both" else 1)
    records = len(goals) * (_EVENT + _RECORD * len(targets))
    return [
        FilePlan(f"{name}=*.ckpt", each, checkpoint),
        FilePlan(f"{name}=*.safetensors", each, weights),
        FilePlan("records (*.jsonl)", 1, records),
    ]


def lightning_files(trainer: pl.Trainer, checkpoint: int, weights: int) -> list[FilePlan]:
    """What `ModelCheckpoint` leaves, as far as its settings tell.

    Args:
        trainer: As configured.
        checkpoint: Bytes of one.
        weights: Bytes of the weights alone.
    """
    found = []
    epochs = 0 if trainer.max_epochs in (None, -1) else int(trainer.max_epochs)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            kept = callback.save_top_k if callback.save_top_k >= 0 else epochs
            count = kept + bool(callback.save_last)
            size = weights if callback.save_weights_only else checkpoint
            found += [FilePlan("checkpoints of ModelCheckpoint", count, size)] if count else []
    return found
