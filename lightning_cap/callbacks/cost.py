"""What the goals of a run count, and what that costs."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_cap.callbacks.run import Run
from lightning_cap.pruners import Pruner
from lightning_cap.sparsity.cost import Cost
from lightning_cap.trainer.saving import goal_name
from lightning_cap.trainer.units import prepare_cost
from lightning_cap.utilities.arguments import require_instance


def with_cost(pruner: Pruner, cost: Cost | None) -> Pruner:
    """A pruner whose goals count ``cost``; None for what they count already.

    Raises:
        ConfigError: ``cost`` is none.
        UnsupportedError: Zeros, or units, save nothing of it.
    """
    require_instance("cost", cost, Cost, "Flops()", optional=True)
    if cost is None:
        return pruner
    if pruner.takes_units and dataclasses.is_dataclass(pruner):
        return dataclasses.replace(pruner, cost=cost)
    if not pruner.takes_units:
        cost.prices({})
    changed = copy.copy(pruner)
    changed.cost = cost
    return changed


def price_units(
    trainer: pl.Trainer, module: pl.LightningModule, pruner: Pruner, run: Run, seed: int, folder: Path | None
) -> None:
    """Measure what goals count, where that is to be measured; refuse units that have no price.

    Args:
        trainer: In ``fit``.
        module: Its LightningModule.
        pruner: Of the run.
        run: With the targets; nothing is done where they are not of units.
        seed: Of the samples that the model is measured with.
        folder: Of the run, for what is to be kept.
    """
    targets = run.targets
    if targets.units is not None:
        prepare_cost(trainer, module, pruner.cost, targets.units, seed, folder)
        pruner.check(targets)
        prices = pruner.cost.unit_prices(targets.units, targets.shapes)
        goals = dict.fromkeys(run.events.values())
        rank_zero_info(f"Goals count {goal_name(pruner)}: {prices.summary(list(goals))}")
