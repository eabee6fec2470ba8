"""The image classifier that the recipes train and prune."""

from __future__ import annotations

from lightning_cap.classifier.distillation import DistillationLoss
from lightning_cap.classifier.vision import VisionClassifier
from lightning_cap.classifier.weights import load_weights

__all__ = ["DistillationLoss", "VisionClassifier", "load_weights"]
