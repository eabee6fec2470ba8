"""Records of a comparison, made by hand."""

from __future__ import annotations

from dataclasses import replace

from lightning_cap.comparison.records import ComparisonRecord, GridPoint
from lightning_cap.trainer.records import Saving

UNPRUNED = ComparisonRecord(
    pruner="unpruned", label="unpruned", seed=None, goal=0.0, sparsity=0.0, sparsities={}, predicted_loss=0.0,
    metrics={"val_loss": 0.1, "val_acc": 0.99}, solution="", fingerprint="d",
)  # fmt: skip


def saved(record: ComparisonRecord, cost: str = "flops", unit: str = "FLOPs") -> ComparisonRecord:
    """The same of a pruner of units, of a model of 6 M; the zeros are fewer."""
    saving = Saving(cost, record.goal, 6e6 * (1 - record.goal), unit)
    return replace(record, saving=saving, sparsity=record.goal - 0.125)


def record(
    pruner: str, goal: float, seed: int, acc: float, grid: GridPoint | None = None, loss: float | None = 0.1
) -> ComparisonRecord:
    damp = grid.value if grid else 1e-6
    return ComparisonRecord(
        pruner=pruner,
        label=pruner if grid is None else f"{pruner} {grid.setting}={grid.value:g}",
        grid=grid,
        seed=seed,
        goal=goal,
        sparsity=goal,
        sparsities={"net.0.weight": goal - 0.1, "net.1.weight": goal + 0.05},
        metrics={"val_loss": 0.2, "val_acc": acc},
        predicted_loss=goal / 100,
        loss_increase={"validation": 0.1, "calibration": loss},
        seconds={"collect": 1.0, "solve": 2.0, "apply": 0.5, "evaluate": 1.0},
        settings=f"mine.{pruner}: {pruner}(damp={damp:g})",
        parameters={"num_gradients": 16, "damp": damp, "num_recomputations": 1},
        solution="",
        fingerprint=f"{pruner}{goal}{seed}{damp}",
    )
