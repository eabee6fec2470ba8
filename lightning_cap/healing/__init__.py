"""What mends a model after weights were pruned, without labels and without training."""

from lightning_cap.healing.argument import as_heal
from lightning_cap.healing.base import Heal, HealArgument, HealReport
from lightning_cap.healing.distill import DistillHeal
from lightning_cap.healing.layerwise import LayerwiseHeal

__all__ = ["DistillHeal", "Heal", "HealArgument", "HealReport", "LayerwiseHeal", "as_heal"]
