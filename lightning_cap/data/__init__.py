"""Data modules and the paper's training recipes."""

from __future__ import annotations

from lightning_cap.data.digits import DigitsDataModule
from lightning_cap.data.imagenet import ImageNetDataModule
from lightning_cap.data.recipes import TrainingRecipe, get_training_recipe

__all__ = ["DigitsDataModule", "ImageNetDataModule", "TrainingRecipe", "get_training_recipe"]
