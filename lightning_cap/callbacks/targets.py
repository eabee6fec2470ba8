"""Which weights a run prunes: those of its checkpoint or of the last fit, else those that a forward pass tells."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_cap.callbacks.run import Run
from lightning_cap.callbacks.state import Restored, load_ends
from lightning_cap.sparsity.ends import PENDING, Ends


def run_of_same_model(run: Run | None, module: pl.LightningModule) -> Run | None:
    """An earlier run, if it pruned weights of this module and had come so far as to choose them."""
    if run is None or run.targets.ends is PENDING:
        return None
    own = {id(parameter) for parameter in module.parameters()}
    return run if all(id(weight) in own for weight in run.targets.values()) else None


def known_ends(restored: Restored | None, previous: Run | None) -> Ends:
    """First and last layers of the run that goes on, or of the fit before; `PENDING` where a forward pass is to tell them.

    Args:
        restored: What the checkpoint holds, None if the run begins.
        previous: The fit before of the same model, None if there was none.
    """
    ends = load_ends(restored) if restored is not None else previous.targets.ends if previous is not None else None
    return PENDING if ends is None else ends
