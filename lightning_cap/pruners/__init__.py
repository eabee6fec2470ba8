"""Pruning methods, one file each."""

from lightning_cap.pruners.base import GradientSource, Pruner, PruneResult, PruningPath
from lightning_cap.pruners.cap import CAP
from lightning_cap.pruners.magnitude import Magnitude

__all__ = ["CAP", "GradientSource", "Magnitude", "PruneResult", "Pruner", "PruningPath"]
