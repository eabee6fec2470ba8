"""Which weights may be pruned, which masks are allowed, and how the zeros are shared out."""

from lightning_cap.sparsity.allocation import ERK, Allocation, Global, PerTarget, Uniform
from lightning_cap.sparsity.cost import Cost, Parameters
from lightning_cap.sparsity.ends import Ends, find_ends
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.patterns import BlockOf, NofM, OutputRows, Pattern, Unstructured, check_pattern
from lightning_cap.sparsity.targets import Targets

__all__ = [
    "ERK",
    "Allocation",
    "BlockOf",
    "Cost",
    "Ends",
    "Global",
    "MaskSet",
    "NofM",
    "OutputRows",
    "Parameters",
    "Pattern",
    "PerTarget",
    "Targets",
    "Uniform",
    "Unstructured",
    "check_pattern",
    "find_ends",
]
