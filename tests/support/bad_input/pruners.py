"""Bad input to pruners, their paths and results, and the solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_cap.errors import CAPError, ConfigError, GradientError, PatternError
from lightning_cap.pruners import (
    CAP,
    MFAC,
    PDP,
    DiagonalFisher,
    DropAndGrow,
    FastCAP,
    GradientTimesWeight,
    LayerwiseOBS,
    Magnitude,
    Pruner,
    Random,
    Taylor,
    WoodFisher,
)
from lightning_cap.pruners.base import refuse_splitting
from lightning_cap.solver import eliminate, reconstruct, update_independently
from lightning_cap.solver.backend import choose_backend
from lightning_cap.solver.damping import RelativeDamp
from lightning_cap.solver.ranking import block_scores
from lightning_cap.sparsity import ERK, Global, NofM, Targets, Unstructured
from tests.support.bad_input.table import NO_COUNTS, NO_NUMBERS, Line, wrong

NO_FLAGS: tuple[Any, ...] = ("yes", None, 1, 0.0, [])
NO_DAMPS: tuple[Any, ...] = (*NO_NUMBERS, -1.0)
SHAPES = {"a": (4, 8), "b": (8, 4)}
#: One of each way to go about it.
PATHS: list[Pruner] = [
    CAP(block_size=8, damp=1e-2), WoodFisher(block_size=8, damp=1e-2), MFAC(block_size=8, damp=1e-2),
    FastCAP(block_size=8, damp=1e-2), DiagonalFisher(), Taylor(), DropAndGrow(), Magnitude(),
]  # fmt: skip
BLOCKS: list[type[Any]] = [CAP, WoodFisher, MFAC, FastCAP, LayerwiseOBS]
GRADIENTS: list[type[Any]] = [CAP, WoodFisher, MFAC, FastCAP, DiagonalFisher, GradientTimesWeight, Taylor, DropAndGrow]
ALL: list[type[Any]] = [*GRADIENTS, LayerwiseOBS, Magnitude, PDP, Random]


def targets() -> Targets:
    generator = torch.Generator().manual_seed(0)
    return Targets({name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()})


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randn(12, *shape, generator=generator) for name, shape in SHAPES.items()}]


def masks() -> dict[str, Tensor]:
    """Some weights are pruned, so that `DropAndGrow` reads gradients."""
    out = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    out["a"][0] = False
    return out


def line(name: str, run: Callable[[], Any], *words: str, error: type[CAPError] = ConfigError) -> Line:
    return Line(name, lambda _: run(), error, words)


OTHERS = Targets({"a": torch.ones(8), "b": torch.ones(8, 4)})
NO_BLOCKS: dict[str, tuple[Any, ...]] = {
    "weights": ("w", None), "alive": (None, torch.ones(2, 4)), "pruned": ("none", None), "chunk": ("3", 0, 2.0),
}  # fmt: skip


def print_nothing() -> None:
    """Takes no arguments."""


def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(**given: Any) -> Any:
        return function(**given)

    call.__name__ = name
    return call


def of_paths() -> list[Line]:
    """What every pruner's ``path``, its ``at``, its ``curve`` and its ``scores`` are given."""
    lines = []
    for pruner in PATHS:
        name = type(pruner).__name__

        def path(targets: Any = None, pruner: Pruner = pruner, **given: Any) -> Any:
            return pruner.path(targets, **{"gradients": rows(), "masks": masks(), **given})

        def at(sparsity: Any, path: Any = path) -> Any:
            return path(targets()).at(sparsity)

        def curve(sparsities: Any, path: Any = path) -> Any:
            return path(targets()).curve(sparsities)

        def scores(most: Any, path: Any = path) -> Any:
            return path(targets()).scores(most)

        path.__name__, at.__name__, curve.__name__ = f"{name}.path", f"{name}.path.at", f"{name}.path.curve"
        scores.__name__ = f"{name}.path.scores"
        lines += wrong(
            path, "targets", None, nn.Linear(8, 4), {"a": torch.ones(4, 8)}, words=["Targets.from_model(model)"]
        )
        lines += wrong(path, "masks", "all", [True], given={"targets": targets()})
        lines += wrong(path, "progress", "bar", 3, int, print_nothing, given={"targets": targets()})
        lines += wrong(path, "gradients", None, 3, "rows", torch.ones(2), rows()[0], error=GradientError,
                       given={"targets": targets()})  # fmt: skip
        lines += wrong(scores, "most", *NO_COUNTS)
        lines += wrong(at, "sparsity", *NO_NUMBERS, 1.0, -0.1, 50, error=PatternError, words=["[0, 1)"])
        lines += wrong(
            curve, "sparsities", None, 0.5, "0.5", {0.5: 1}, torch.tensor(0.5), np.array(0.5), words=["give a list"]
        )
        lines += wrong(
            named(f"{name}.begin_event", pruner.begin_event), "done", "0", None, True, -0.1, 1.5, float("nan"), words=[]
        )
        lines += wrong(named(f"{name}.load_state_dict", pruner.load_state_dict), "state", None, 3, "state")
        lines += wrong(named(f"{name}.plan", pruner.plan), "targets", None, "model", nn.Linear(8, 4))
        lines += wrong(named(f"{name}.plan", pruner.plan), "masks", "all", [True], given={"targets": targets()})
        lines += [line(f"{name}.check(None)", lambda p=pruner: p.check(None), "targets=None")]
        lines += [
            line(f"{name}.check_goals of no targets", lambda p=pruner: p.check_goals(None, None, [0.5]), "targets=None")
        ]
        lines += [
            line(f"{name}.check_goals({s!r})", lambda p=pruner, s=s: p.check_goals(targets(), None, s), "sparsities=")
            for s in (None, 0.5, "0.5")
        ]
        lines += [
            line(
                f"{name}.check_goals([{s!r}])",
                lambda p=pruner, s=s: p.check_goals(targets(), None, [s]),
                "sparsity=",
                error=PatternError,
            )
            for s in (None, 1, "0.5", True)
        ]
        lines += [
            line(
                f"{name}.check_sparsity({s!r})",
                lambda p=pruner, s=s: p.check_sparsity(s),
                "sparsity=",
                error=PatternError,
            )
            for s in ("0.5", None, True, 1.0)
        ]
    return lines


def chunks() -> list[Line]:
    """Gradient rows that are none, for each pruner that reads them."""
    whole = rows()[0]
    bad: list[tuple[str, Any, str]] = [
        ("lists", [[1.0]], "a chunk is a list"),
        ("tensors", [torch.ones(3, 4, 8)], "a chunk is a Tensor"),
        ("a target missing", [{"a": whole["a"]}], "the rows of 'b' are missing"),
        ("rows of lists", [{**whole, "b": [1.0]}], "the rows of 'b' are of type list"),
        (
            "whole numbers",
            [{**whole, "b": torch.ones(12, 8, 4, dtype=torch.int64)}],
            "the rows of 'b' are of type torch.int64",
        ),
        (
            "turned rows",
            [{**whole, "b": torch.ones(12, 4, 8)}],
            "the rows of 'b' have shape (4, 8), its weight has (8, 4)",
        ),
        ("single gradients", [{n: row[0] for n, row in whole.items()}], "have shape"),
        ("unequal counts", [{**whole, "b": whole["b"][:3]}], "a chunk has [3, 12] rows"),
        ("nothing", [], "no gradient row"),
        ("not finite", [{n: torch.full_like(row, torch.nan) for n, row in whole.items()}], "not finite"),
        ("zeros", [{n: torch.zeros_like(row) for n, row in whole.items()}], "all 12 are zero"),
    ]
    return [
        line(
            f"{type(pruner).__name__}.path: {name}",
            lambda p=pruner, c=chunk: p.path(targets(), c, masks()),
            "gradients: ",
            word,
            error=GradientError,
        )
        for pruner in PATHS
        if pruner.statistic is not None
        for name, chunk, word in bad
    ]


def solve(weights: Any = None, alive: Any = None, damp: Any = 1e-2, **given: Any) -> Any:
    """Named as `eliminate`, with blocks."""
    fisher = torch.eye(4).expand(2, 4, 4)
    w = torch.ones(2, 4) if weights is None else weights
    return eliminate(fisher, w, torch.ones(2, 4, dtype=torch.bool) if alive is None else alive, damp,
                     **{"pattern": Unstructured(), **given})  # fmt: skip


def rebuild(function: Callable[..., Any]) -> Callable[..., Any]:
    """`reconstruct` or `update_independently`, with blocks."""

    def call(**given: Any) -> Any:
        ones, fisher = torch.ones(2, 4, dtype=torch.bool), torch.eye(4).expand(2, 4, 4)
        usual = {
            "weights": torch.ones(2, 4),
            "alive": ones,
            "pruned": ~ones,
            "damp": torch.ones(2),
            "use_float64": ones[:, 0],
        }
        return function(fisher, **{**usual, **given})

    call.__name__ = function.__name__
    return call


def splitting(num_recomputations: Any) -> None:
    refuse_splitting(CAP(), num_recomputations)


LINES = [
    *(entry for kind in BLOCKS for entry in wrong(kind, "block_size", *NO_COUNTS)),
    *(entry for kind in BLOCKS for entry in wrong(kind, "damp", *NO_DAMPS, 0, 0.0, "Auto", RelativeDamp)),
    *wrong(RelativeDamp, "fraction", *NO_NUMBERS, 0, -1.0),
    *wrong(RelativeDamp, "scope", "model", None, 1, ["block"], given={"fraction": 0.1}),
    *(entry for kind in GRADIENTS for entry in wrong(kind, "num_gradients", *NO_COUNTS)),
    *(entry for kind in GRADIENTS for entry in wrong(kind, "samples_per_gradient", "1", None, True, 32.0, 0)),
    *(entry for kind in ALL for entry in wrong(kind, "allocation", None, "ERK", ERK, 0.5, [Global()])),
    *(
        entry
        for kind in ALL
        if kind is not DropAndGrow
        for entry in wrong(kind, "pattern", "2:4", 124, NofM, True, [2, 4], 2.4, error=PatternError)
    ),
    *wrong(DiagonalFisher, "damp", *NO_DAMPS),
    *wrong(LayerwiseOBS, "num_inputs", *NO_COUNTS),
    *wrong(DropAndGrow, "drop_fraction", *NO_NUMBERS, 1.0, -0.1),
    *wrong(Random, "seed", "0", None, True, 1.0, -1, [0]),
    *wrong(FastCAP, "columns", *NO_COUNTS),
    *(entry for kind in (CAP, MFAC, WoodFisher) for entry in wrong(kind, "row_chunk", "32", None, True, 32.0, 0, 10**9)),
    *(
        entry
        for kind in (CAP, MFAC, WoodFisher)
        for entry in wrong(kind, "max_memory", "much", "", "-1GB", "0", 0, -1, True, 2.5e9, [1], float("nan"), np.float64(1e9))
    ),
    *(entry for kind in (CAP, WoodFisher) for entry in wrong(kind, "storage", "half", None, True, 1, ["full"])),
    *(entry for kind in (CAP, WoodFisher) for entry in wrong(kind, "allow_tf32", *NO_FLAGS)),
    *(entry for kind in (CAP, WoodFisher) for entry in wrong(kind, "shrinkage", *NO_NUMBERS, 1.1, -0.1)),
    *wrong(CAP, "ranking", "best", None, 1, ["marginal"]),
    *(entry for kind in (CAP, LayerwiseOBS) for entry in wrong(kind, "backend", "cuda", None, 1, ["torch"])),
    *wrong(WoodFisher, "update", "all", None, True),
    *wrong(MFAC, "mode", "fast", None, 1),
    *of_paths(),
    *chunks(),
    *(
        line(f"PruneResult.apply({t!r})", lambda t=t: Magnitude().path(targets()).at(0.5).apply(t), "targets=")
        for t in (None, "model", nn.Linear(8, 4), Targets({"a": torch.ones(4, 8)}), OTHERS)
    ),
    *wrong(splitting, "num_recomputations", *NO_COUNTS),
    *wrong(solve, "weights", "w", [1.0], torch.ones(4), torch.ones(2, 4, dtype=torch.int64)),
    *wrong(solve, "alive", "all", torch.ones(2, 4), torch.ones(4, 2, dtype=torch.bool)),
    *wrong(solve, "damp", *(value for value in NO_DAMPS if not isinstance(value, Tensor)), 0),
    *wrong(solve, "damp", torch.ones(3), torch.zeros(2), torch.ones(2, dtype=torch.int64)),
    *wrong(solve, "pattern", None, "2:4", NofM),
    *wrong(solve, "chunk", *(value for value in NO_COUNTS if value is not None)),
    *wrong(solve, "backend", "cuda", None, 3),
    *(
        entry
        for function in (reconstruct, update_independently)
        for argument, values in NO_BLOCKS.items()
        for entry in wrong(rebuild(function), argument, *values)
    ),
    *wrong(rebuild(update_independently), "group", "2", None, 2.0, 0),
    *wrong(choose_backend, "backend", "cuda", None, True, given={"device": torch.device("cpu")}),
    *wrong(block_scores, "ranking", "best", None, 1, given={"losses": torch.ones(2, 3)}),
]  # fmt: skip
