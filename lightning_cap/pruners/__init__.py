"""Pruning methods, one file each."""

from lightning_cap.pruners.base import Pruner
from lightning_cap.pruners.blockwise import RelativeDamp
from lightning_cap.pruners.cap import CAP
from lightning_cap.pruners.cap_units import CAPUnits
from lightning_cap.pruners.drop_and_grow import DropAndGrow
from lightning_cap.pruners.fast_cap import FastCAP
from lightning_cap.pruners.gradient import GradientTimesWeight, Taylor
from lightning_cap.pruners.layerwise import LayerwiseOBS
from lightning_cap.pruners.layerwise_units import LayerwiseUnits
from lightning_cap.pruners.lrp_units import LRPUnits
from lightning_cap.pruners.magnitude import Magnitude
from lightning_cap.pruners.magnitude_units import MagnitudeUnits
from lightning_cap.pruners.mfac import MFAC
from lightning_cap.pruners.obd import DiagonalFisher
from lightning_cap.pruners.paths import PruneResult, PruningPath
from lightning_cap.pruners.pdp import PDP
from lightning_cap.pruners.random import Random
from lightning_cap.pruners.random_units import RandomUnits
from lightning_cap.pruners.taylor_units import TaylorUnits
from lightning_cap.pruners.units import UnitPruner
from lightning_cap.pruners.woodfisher import WoodFisher

__all__ = [
    "CAP",
    "MFAC",
    "PDP",
    "CAPUnits",
    "DiagonalFisher",
    "DropAndGrow",
    "FastCAP",
    "GradientTimesWeight",
    "LRPUnits",
    "LayerwiseOBS",
    "LayerwiseUnits",
    "Magnitude",
    "MagnitudeUnits",
    "PruneResult",
    "Pruner",
    "PruningPath",
    "Random",
    "RandomUnits",
    "RelativeDamp",
    "Taylor",
    "TaylorUnits",
    "UnitPruner",
    "WoodFisher",
]
