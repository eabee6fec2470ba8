"""From batches to gradient rows or layer inputs."""

from lightning_cap.calibration.batches import CalibrationBatches
from lightning_cap.calibration.gradients import GradientCollector
from lightning_cap.calibration.layer_inputs import InputCollector, LayerGrams, sum_up
from lightning_cap.calibration.statistics import GradientSamples, LayerInputs, Statistic

__all__ = [
    "CalibrationBatches",
    "GradientCollector",
    "GradientSamples",
    "InputCollector",
    "LayerGrams",
    "LayerInputs",
    "Statistic",
    "sum_up",
]
