"""Pruning methods, one file each."""

from lightning_cap.pruners.base import Pruner, PruneResult, PruningPath
from lightning_cap.pruners.cap import CAP
from lightning_cap.pruners.drop_and_grow import DropAndGrow
from lightning_cap.pruners.magnitude import Magnitude

__all__ = ["CAP", "DropAndGrow", "Magnitude", "PruneResult", "Pruner", "PruningPath"]
