"""The table of pruners. Every suite takes its cases from here, by what they promise: a new pruner is one line in `CASES`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_cap.calibration.layer_inputs import LayerGrams
from lightning_cap.pruners import (
    CAP,
    MFAC,
    PDP,
    CAPUnits,
    DiagonalFisher,
    DropAndGrow,
    FastCAP,
    GradientTimesWeight,
    LayerwiseOBS,
    LayerwiseUnits,
    LRPUnits,
    Magnitude,
    MagnitudeUnits,
    Pruner,
    Random,
    RandomUnits,
    Taylor,
    TaylorUnits,
    UnitPruner,
    WoodFisher,
)
from lightning_cap.sparsity.allocation import ERK, Global, Uniform
from lightning_cap.sparsity.patterns import BlockOf, NofM, OutputRows, Pattern

SMALL: dict[str, Any] = {"block_size": 7, "num_gradients": 40, "num_inputs": 40, "damp": 1e-2}


@dataclass(frozen=True)
class Case:
    """A pruner with settings, and what it promises.

    Attributes:
        kind: Its class.
        own: Settings of the case. They go before those of a suite.
        reads: What it wants to see of the data.
        updates: Whether kept weights move.
        owns_fisher: Whether its path holds the Fisher, and cannot be used once it is closed.
        uniform: Whether every target has a budget of its own.
        signed: Whether saliencies may be negative.
        predicts_loss: Whether they are increases of the loss.
        regrows: Whether masked weights may come back.
        refuses: Kinds of patterns that it refuses.
        edge: Whether the settings are at the edge of what the method takes. Suites with sizes of their own leave it out.
    """

    kind: type[Pruner]
    own: Mapping[str, Any] = field(default_factory=dict)
    reads: Literal["gradients", "inputs", "nothing"] = "gradients"
    updates: bool = True
    owns_fisher: bool = True
    uniform: bool = False
    signed: bool = False
    predicts_loss: bool = True
    regrows: bool = False
    refuses: Sequence[type[Pattern]] = ()
    edge: bool = False

    def pruner(self, **settings: Any) -> Pruner:
        """A new pruner. What the class does not take is left out of ``settings``."""
        suited = {name: value for name, value in {**SMALL, **settings}.items() if self.takes(name)}
        return self.kind(**{**suited, **self.own})

    def takes(self, setting: str | Pattern) -> bool:
        """Whether the class has a setting of this name, or takes this pattern."""
        if isinstance(setting, Pattern):
            return self.takes("pattern") and not isinstance(setting, tuple(self.refuses))
        return setting in inspect.signature(self.kind).parameters

    def path(self, targets: Any, rows: Any, masks: Any = None, *, pruner: Pruner | None = None, **more: Any) -> Any:
        """The path from gradient rows, or from the layer statistics made of them."""
        source = layer_grams(rows) if self.reads == "inputs" else rows
        return (pruner or self.pruner()).path(targets, source, masks, **more)


def layer_grams(rows: Sequence[Mapping[str, Tensor]]) -> list[LayerGrams]:
    """Layer statistics as if the first output row's part of each gradient row were an input."""
    out = []
    for chunk in rows:
        flat = {name: row[:, 0].flatten(1).float() for name, row in chunk.items()}
        out.append(LayerGrams({name: (x.T @ x).unsqueeze(0) for name, x in flat.items()}))
        out[-1].count = len(next(iter(chunk.values())))
    return out


SCORED: dict[str, Any] = {"updates": False, "owns_fisher": False}
BLOCKS: dict[str, Any] = {"refuses": [OutputRows]}
DIAGONAL_BLOCKS: dict[str, Any] = {"refuses": [OutputRows, BlockOf]}
FINE: dict[str, Any] = {"block_size": 16, "damp": 1e-8}  # needs float64

CASES: dict[str, Case] = {
    "cap": Case(CAP, **BLOCKS),
    "cap-cumulative": Case(CAP, {"ranking": "cumulative"}, **BLOCKS),
    "cap-uniform": Case(CAP, {"allocation": Uniform()}, uniform=True, edge=True, **BLOCKS),
    "cap-float64": Case(CAP, FINE, edge=True, **BLOCKS),
    "cap-one-block-each": Case(CAP, {"block_size": 100}, edge=True, **BLOCKS),
    "cap-diagonal": Case(CAP, {"block_size": 1}, updates=False, edge=True, **BLOCKS),
    "woodfisher": Case(WoodFisher, **BLOCKS),
    "woodfisher-simple": Case(WoodFisher, {"update": "simple"}, **BLOCKS),
    "woodfisher-none": Case(WoodFisher, {"update": "none"}, updates=False, edge=True, **BLOCKS),
    "woodfisher-float64": Case(WoodFisher, FINE, edge=True, **BLOCKS),
    "mfac": Case(MFAC, {"block_size": 48}, **DIAGONAL_BLOCKS),
    "mfac-static": Case(MFAC, {"block_size": 48, "mode": "static"}, **DIAGONAL_BLOCKS),
    "mfac-one-block": Case(MFAC, {"block_size": 2048}, edge=True, **DIAGONAL_BLOCKS),
    "fast-cap": Case(FastCAP, {"columns": 4}, owns_fisher=False, **BLOCKS),
    "layerwise": Case(LayerwiseOBS, reads="inputs", predicts_loss=False, uniform=True, **BLOCKS),
    "layerwise-global": Case(
        LayerwiseOBS, {"allocation": Global()}, reads="inputs", predicts_loss=False, edge=True, **BLOCKS
    ),
    "layerwise-whole-rows": Case(
        LayerwiseOBS, {"block_size": 100}, reads="inputs", predicts_loss=False, uniform=True, edge=True, **BLOCKS
    ),
    "obd": Case(DiagonalFisher, **SCORED),
    "gradient-times-weight": Case(GradientTimesWeight, predicts_loss=False, **SCORED),
    "taylor": Case(Taylor, signed=True, predicts_loss=False, **SCORED),
    "magnitude": Case(Magnitude, reads="nothing", predicts_loss=False, **SCORED),
    "magnitude-uniform": Case(
        Magnitude, {"allocation": Uniform()}, reads="nothing", predicts_loss=False, uniform=True, edge=True, **SCORED
    ),
    "magnitude-erk": Case(
        Magnitude, {"allocation": ERK()}, reads="nothing", predicts_loss=False, uniform=True, edge=True, **SCORED
    ),
    "pdp": Case(PDP, reads="nothing", predicts_loss=False, edge=True, refuses=[NofM, BlockOf, OutputRows], **SCORED),
    "random": Case(Random, {"seed": 3}, reads="nothing", predicts_loss=False, **SCORED),
    "drop-and-grow": Case(DropAndGrow, regrows=True, predicts_loss=False, **SCORED),
    "drop-and-grow-uniform": Case(
        DropAndGrow, {"allocation": Uniform()}, regrows=True, predicts_loss=False, uniform=True, edge=True, **SCORED
    ),
}


def select(**promises: Any) -> dict[str, Case]:
    """The cases whose attributes are these."""
    return {n: case for n, case in CASES.items() if all(getattr(case, k) == v for k, v in promises.items())}


#: What prunes once and for all, at settings in the middle: for suites with sizes, patterns or allocations of their own.
USUAL = select(edge=False, regrows=False)
#: The first of them of each class, by its name.
METHODS: dict[str, Case] = {}
for _case in USUAL.values():
    METHODS.setdefault(_case.kind.__name__, _case)


@dataclass(frozen=True)
class UnitCase:
    """A pruner of units with settings, and what it promises.

    Attributes:
        kind: Its class.
        own: Settings of the case.
        reads: What it wants to see of the data.
        updates: Whether kept weights move.
        predicts_loss: Whether its saliencies are increases of the loss.
        uniform: Whether every group loses about the same share.
    """

    kind: type[UnitPruner]
    own: Mapping[str, Any] = field(default_factory=dict)
    reads: Literal["gradients", "relevances", "inputs", "nothing"] = "gradients"
    updates: bool = False
    predicts_loss: bool = False
    uniform: bool = False

    def pruner(self, **settings: Any) -> UnitPruner:
        """A new pruner. What the class does not take is left out of ``settings``."""
        names = inspect.signature(self.kind).parameters
        return self.kind(**{**{name: v for name, v in settings.items() if name in names}, **self.own})

    def path(self, targets: Any, rows: Any, masks: Any = None, *, pruner: UnitPruner | None = None) -> Any:
        """The path from gate gradients, or from layer statistics as many."""
        source = reader_grams(targets, rows) if self.reads == "inputs" else rows
        if self.reads == "relevances" and isinstance(rows, list):  # with a sign; here of those that are positive
            source = [{name: row.abs() for name, row in chunk.items()} for chunk in rows]
        return (pruner or self.pruner()).path(targets, source, masks)


def reader_grams(targets: Any, rows: Sequence[Any]) -> list[Any]:
    """Layer statistics of the weights that read units, drawn; all zero where the gate gradients of the group are."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for chunk in rows:
        grams = LayerGrams()
        for name, group in targets.units.items():
            for part in group.consumers:
                x = torch.randn(60, targets[part.name][0].numel(), generator=generator)
                peak = chunk[name].float().abs().amax()
                x = (x + x.roll(1, dims=1)) * (peak / peak.clamp_min(1e-9))  # by 0, 1 or NaN
                grams[part.name] = (x.T @ x).unsqueeze(0)
        grams.count = len(next(iter(chunk.values())))
        out.append(grams)
    return out


CAP_UNITS: dict[str, Any] = {"updates": True, "predicts_loss": True}

UNIT_CASES: dict[str, UnitCase] = {
    "cap-units": UnitCase(CAPUnits, {"num_gradients": 40}, **CAP_UNITS),
    "cap-units-uniform": UnitCase(CAPUnits, {"allocation": Uniform()}, uniform=True, **CAP_UNITS),
    "layerwise-units": UnitCase(LayerwiseUnits, {"num_inputs": 40}, reads="inputs", updates=True),
    "layerwise-units-uniform": UnitCase(
        LayerwiseUnits, {"allocation": Uniform()}, reads="inputs", updates=True, uniform=True
    ),
    "lrp-units": UnitCase(LRPUnits, {"num_inputs": 40}, reads="relevances"),
    "lrp-units-none": UnitCase(LRPUnits, {"normalize": "none"}, reads="relevances"),
    "taylor-units": UnitCase(TaylorUnits, {"num_gradients": 40}),
    "taylor-units-mean": UnitCase(TaylorUnits, {"normalize": "mean"}),
    "magnitude-units": UnitCase(MagnitudeUnits, reads="nothing"),
    "magnitude-units-mean": UnitCase(MagnitudeUnits, {"normalize": "mean"}, reads="nothing"),
    "random-units": UnitCase(RandomUnits, {"seed": 3}, reads="nothing"),
}
