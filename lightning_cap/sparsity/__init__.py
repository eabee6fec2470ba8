"""Which weights may be pruned, which masks are allowed, and how the zeros are shared out."""

from lightning_cap.sparsity.allocation import ERK, Allocation, Global, PerTarget, Uniform
from lightning_cap.sparsity.cost import Cost, Flops, Parameters
from lightning_cap.sparsity.ends import Ends, find_ends
from lightning_cap.sparsity.flops import ModelFlops, model_flops, zero_shares
from lightning_cap.sparsity.latency import Latency
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.patterns import BlockOf, NofM, OutputRows, Pattern, Unstructured, check_pattern
from lightning_cap.sparsity.permutation import ChannelOrders, permute_channels
from lightning_cap.sparsity.targets import Targets
from lightning_cap.sparsity.unit_penalty import unit_penalty
from lightning_cap.sparsity.units import UnitGroup, Units

__all__ = [
    "ERK",
    "Allocation",
    "BlockOf",
    "ChannelOrders",
    "Cost",
    "Ends",
    "Flops",
    "Global",
    "Latency",
    "MaskSet",
    "ModelFlops",
    "NofM",
    "OutputRows",
    "Parameters",
    "Pattern",
    "PerTarget",
    "Targets",
    "Uniform",
    "UnitGroup",
    "Units",
    "Unstructured",
    "check_pattern",
    "find_ends",
    "model_flops",
    "permute_channels",
    "unit_penalty",
    "zero_shares",
]
