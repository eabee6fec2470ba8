"""Fine-tunes each checkpoint of a pruning run."""

from lightning_cap.sweep.checkpoints import PrunedCheckpoint, SweepFolder, find_checkpoints
from lightning_cap.sweep.finetuning import Finetuning

__all__ = ["Finetuning", "PrunedCheckpoint", "SweepFolder", "find_checkpoints"]
