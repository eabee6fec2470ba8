"""Pruning methods, one file each."""

from lightning_cap.pruners.base import Pruner, PruneResult, PruningPath
from lightning_cap.pruners.cap import CAP
from lightning_cap.pruners.magnitude import Magnitude

__all__ = ["CAP", "Magnitude", "PruneResult", "Pruner", "PruningPath"]
