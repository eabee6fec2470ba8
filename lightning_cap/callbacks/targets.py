"""What a run prunes: what its checkpoint or the last fit say, else what a forward pass tells."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl

from lightning_cap.callbacks.run import Run
from lightning_cap.callbacks.state import Restored, load_ends, load_units
from lightning_cap.pruners import Pruner
from lightning_cap.sparsity.ends import PENDING, Ends
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.units import Units
from lightning_cap.trainer.ends import find_module_ends
from lightning_cap.trainer.units import find_module_units


def run_of_same_model(run: Run | None, module: pl.LightningModule) -> Run | None:
    """An earlier run, if it pruned weights of this module and had come so far as to choose them."""
    if run is None or run.targets.ends is PENDING:
        return None
    own = {id(parameter) for parameter in module.parameters()}
    return run if all(id(weight) in own for weight in run.targets.values()) else None


def known_parts(pruner: Pruner, restored: Restored | None, previous: Run | None) -> Ends | Units:
    """First and last layers, or units, of the run that goes on or of the fit before; `PENDING` where a forward pass is to tell.

    Args:
        pruner: Of the run.
        restored: What the checkpoint holds, None if the run begins.
        previous: The fit before of the same model, None if there was none.
    """
    found: Ends | Units | None = None
    if restored is not None:
        found = load_units(restored) if pruner.takes_units else load_ends(restored)
    elif previous is not None:
        found = previous.targets.units if pruner.takes_units else previous.targets.ends
    return PENDING if found is None else found


def find_parts(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    pruner: Pruner,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    seed: int,
) -> Ends | Units:
    """First and last layers, or units, by a forward pass. Every rank must call it. Arguments: see `find_module_units`."""
    if pruner.takes_units:
        return find_module_units(trainer, module, include, exclude, seed)
    return find_module_ends(trainer, module, seed)


def choose_targets(
    module: pl.LightningModule,
    pruner: Pruner,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    parts: Ends | Units,
) -> Targets:
    """What is pruned, or, while ``parts`` are `PENDING`, stands for it.

    Raises:
        TargetError: A pattern matches nothing, or nothing can be pruned.
    """
    if isinstance(parts, Units):
        return parts.targets(module)
    if pruner.takes_units:
        return Targets.from_model(module, ends=parts)
    return Targets.from_model(module, include, exclude, parts)
