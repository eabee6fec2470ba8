"""Correlation-aware pruning (CAP) of vision models as a PyTorch Lightning callback."""

from lightning_cap._version import __version__
from lightning_cap.callback import CAPPruningCallback
from lightning_cap.comparison import compare
from lightning_cap.lr import CyclicLinearLR
from lightning_cap.module import VisionClassifier
from lightning_cap.oneshot import prune

__all__ = ["CAPPruningCallback", "CyclicLinearLR", "VisionClassifier", "__version__", "compare", "prune"]
