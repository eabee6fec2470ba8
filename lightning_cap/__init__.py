"""Correlation-aware pruning (CAP) of vision models as a PyTorch Lightning callback."""

from lightning_cap._version import __version__
from lightning_cap.callbacks.mask_sparsity import MaskSparsity
from lightning_cap.callbacks.pdp import PDPCallback
from lightning_cap.callbacks.pruning import CAPPruningCallback
from lightning_cap.callbacks.qat import QATCallback
from lightning_cap.classifier import DistillationLoss, VisionClassifier
from lightning_cap.comparison import compare
from lightning_cap.oneshot import prune
from lightning_cap.schedules.learning_rate import CosineLR, CyclicLinearLR

__all__ = [
    "CAPPruningCallback",
    "CosineLR",
    "CyclicLinearLR",
    "DistillationLoss",
    "MaskSparsity",
    "PDPCallback",
    "QATCallback",
    "VisionClassifier",
    "__version__",
    "compare",
    "prune",
]
