"""What a pruning cycle leaves behind: checkpoints at the requested sparsities and the rows of the final table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_cap.callbacks.weight_averaging import averaged_models
from lightning_cap.export.safetensors import save_weights, sparsity_stem
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed

#: One line of the final table; plain Python values, so that it can live in a checkpoint.
Row = dict[str, Any]


def checkpoint_dir(trainer: pl.Trainer, dirpath: str | None) -> Path:
    """``dirpath``, or ``checkpoints`` in the logger's folder, or in ``default_root_dir``. Call it on every rank."""
    if dirpath is not None:
        return Path(dirpath)
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"


def monitored(metrics: Mapping[str, Any], monitor: str | None) -> tuple[str | None, float | None]:
    """Name and value of the monitored metric; ``monitor=None`` takes the logged validation accuracy, if there is one."""
    if monitor is None:
        names = [name for name in metrics if "val" in name.lower() and "acc" in name.lower()]
        monitor = min(names, key=len, default=None)
    if monitor is None or monitor not in metrics:
        return monitor, None
    return monitor, float(metrics[monitor])


def make_row(
    target: float, epoch: int, value: float | None, sparsity: float, *, best: bool = False, folder: Path | None = None
) -> Row:
    """A row of the table; with a ``folder``, the files that it stands for are named there."""
    stem = "" if folder is None else str(folder / (sparsity_stem(target) + ("-best" if best else "")))
    return {
        "target": target,
        "epoch": epoch,
        "value": value,
        "sparsity": sparsity,
        "best": best,
        "checkpoint": stem and f"{stem}.ckpt",
        "weights": stem and f"{stem}.safetensors",
    }


def is_better(value: float | None, best: float | None, mode: Literal["min", "max"]) -> bool:
    """Whether ``value`` improves on ``best`` (which may not exist yet)."""
    if value is None or value != value:
        return False
    return best is None or (value > best if mode == "max" else value < best)


def save_cycle(trainer: pl.Trainer, module: pl.LightningModule, targets: Targets, row: Row) -> None:
    """Write ``row["checkpoint"]`` (the Trainer's) and ``row["weights"]`` (plain safetensors). Call it on every rank."""
    trainer.save_checkpoint(row["checkpoint"], weights_only=False)
    with distributed.raise_on_all_ranks("Saving the pruned weights"):
        if trainer.is_global_zero:
            averages = averaged_models(trainer)
            model = getattr(averages[0], "module", averages[0]) if averages else module
            save_weights(model, targets, Path(row["weights"]), sparsity=row["sparsity"], goal=row["target"])
