"""Pruners compared on one model: sparsities, seeds, settings."""

from lightning_cap.comparison.compare import compare
from lightning_cap.comparison.records import ComparisonRecord
from lightning_cap.comparison.surface import LossSurface

__all__ = ["ComparisonRecord", "LossSurface", "compare"]
