"""Bad input to pruners of units, their paths, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_cap.calibration.layer_inputs import sum_up
from lightning_cap.calibration.relevance import UnitRelevance
from lightning_cap.calibration.unit_samples import UnitInputs, UnitSamples
from lightning_cap.errors import CAPError, ConfigError, GradientError, PatternError, TargetError, UnsupportedError
from lightning_cap.pruners import (
    CAPUnits,
    LayerwiseUnits,
    LRPUnits,
    MagnitudeUnits,
    RandomUnits,
    TaylorUnits,
    UnitPruner,
)
from lightning_cap.sparsity import ERK, Cost, Flops, Global, PerTarget, Targets
from tests.support.bad_input.table import NO_COUNTS, NO_NUMBERS, Line, wrong
from tests.support.units import cross_entropy, gate_rows, images, small_net, small_targets, small_units

ALL: list[type[Any]] = [CAPUnits, LayerwiseUnits, LRPUnits, TaylorUnits, MagnitudeUnits, RandomUnits]
SCORED: list[type[Any]] = [LRPUnits, TaylorUnits, MagnitudeUnits, RandomUnits]
GRADIENTS: list[type[Any]] = [CAPUnits, TaylorUnits]
NO_DAMPS: tuple[Any, ...] = (*NO_NUMBERS, 0, -1.0)
PLAIN = Targets({"fc.weight": torch.ones(3, 4)})


class OfWeights(Cost):
    """Has no price for units."""

    def prices(self, shapes: Any) -> dict[str, int]:
        return dict.fromkeys(shapes, 1)


def line(name: str, run: Callable[[], Any], *words: str, error: type[CAPError] = ConfigError) -> Line:
    return Line(name, lambda _: run(), error, words)


def of_paths() -> list[Line]:
    """What `UnitPruner.path`, its ``at`` and its ``curve``, and the questions before it, are given."""
    lines: list[Line] = []
    for pruner in (CAPUnits(), MagnitudeUnits(cost=Flops())):
        name = type(pruner).__name__

        def path(targets: Any = None, pruner: UnitPruner = pruner, **given: Any) -> Any:
            rows = gate_rows(small_units(), 8)
            return pruner.path(small_targets() if targets is None else targets, **{"gradients": rows, **given})

        def at(sparsity: Any, path: Any = path) -> Any:
            return path().at(sparsity)

        def curve(sparsities: Any, path: Any = path) -> Any:
            return path().curve(sparsities)

        def reached(masks: Any, pruner: UnitPruner = pruner) -> Any:
            return pruner.reached(small_targets(), masks)

        def exceeds(goal: Any, pruner: UnitPruner = pruner) -> Any:
            return pruner.exceeds(goal, small_targets(), None)

        for function in (path, at, curve, reached, exceeds):
            function.__name__ = f"{name}.{function.__name__}"
        lines += wrong(path, "targets", "model", nn.Linear(8, 4), words=["Targets.from_model(model)"])
        lines += wrong(path, "gradients", None, 3, "rows", torch.ones(2), {}, error=GradientError)
        lines += wrong(path, "masks", "all", [True])
        lines += wrong(path, "progress", "bar", 3, int)
        lines += wrong(at, "sparsity", *NO_NUMBERS, 1.0, -0.1, error=PatternError, words=["[0, 1)"])
        lines += wrong(curve, "sparsities", None, 0.5, "0.5", {0.5: 1})
        lines += wrong(reached, "masks", "all", [True])
        lines += wrong(exceeds, "goal", *NO_NUMBERS, 1.5, -0.1)
        lines += [
            line(
                f"{name}.{ask.__name__} of single weights",
                lambda ask=ask: ask(PLAIN),
                "Units.from_model",
                error=TargetError,
            )
            for ask in (pruner.check, pruner.plan, pruner.prices, path)
        ]
        lines += [
            line(f"{name}: a budget beyond one unit per group", lambda p=pruner: p.check_goals(small_targets(), None, [0.99]),
                 f"{pruner.cost.name}=0.99", "one unit per group", "Ask for less"),
            line(f"{name}.path.at beyond one unit per group", lambda path=path: path().at(0.99), f"{pruner.cost.name}=0.99"),
        ]  # fmt: skip
    return lines


def chunks() -> list[Line]:
    """Gate gradients that are none."""
    whole = gate_rows(small_units(), 4)[0]
    bad: list[tuple[str, Any, str]] = [
        ("lists", [[1.0]], "a chunk is a list"),
        ("a group missing", [{"fc1": whole["fc1"]}], "the rows of 'conv1' are missing"),
        ("too few units", [{**whole, "fc1": whole["fc1"][:, 1:]}], "the rows of 'fc1' have shape (11,)"),
        ("unequal counts", [{**whole, "fc1": whole["fc1"][:2]}], "a chunk has [2, 4] rows"),
        ("nothing", [], "no gradient row"),
        ("not finite", [{n: torch.full_like(row, torch.nan) for n, row in whole.items()}], "not finite"),
        ("zeros", [{n: torch.zeros_like(row) for n, row in whole.items()}], "all 4 are zero"),
    ]
    return [
        line(
            f"{kind.__name__}.path: {name}",
            lambda kind=kind, c=chunk: kind().path(small_targets(), c),
            word,
            error=GradientError,
        )
        for kind in GRADIENTS
        for name, chunk, word in bad
    ]


def losses(candidates: Any) -> Any:
    model = small_net()
    source = UnitSamples(4, num_inputs=4).collector(model, small_units().targets(model), cross_entropy, images(4))
    return source.losses(candidates)


def relevance(**given: Any) -> Any:
    return UnitRelevance(4, **given)


def relevant(loss: Any, batch: Any) -> Any:
    model = small_net()
    return list(UnitRelevance(2).collector(model, small_units().targets(model), loss, [batch]))


X, Y = images(2)[0]
NO_CLASSES: list[tuple[str, Any, Any, type[CAPError], tuple[str, ...]]] = [
    ("no labels", lambda m, b: m(b[0]).sum(), (X,), GradientError, ("classes='labels'", "found none", "classes='predicted'")),
    ("labels beyond the classes", lambda m, b: m(b[0]).sum(), (X, Y + 3), GradientError, ("below 3",)),
    ("labels of another kind", lambda m, b: m(b[0]).sum(), (X, ["cat", "dog"]), GradientError, ("found none",)),
    ("a loss without the model", lambda m, b: X.sum(), (X, Y), TargetError, ("the loss calls no module",)),
    ("outputs that are no logits", lambda m, b: m.conv1(b[0]).sum(), (X, Y), TargetError, ("(1, 6, 5, 5)", "TaylorUnits")),
    ("units that are not reached", lambda m, b: m.fc2(m.fc1(b[0].flatten(1)[:, :7])).sum(), (X, Y), UnsupportedError,
     ("'conv1'", "exclude=[...]")),
]  # fmt: skip


LINES = [
    *(entry for kind in ALL for entry in wrong(kind, "cost", None, "flops", Flops, 0.5)),
    *(entry for kind in ALL for entry in wrong(kind, "allocation", None, "ERK", Global, 0.5, ERK(), PerTarget({"a": 0.5}))),
    *(entry for kind in GRADIENTS for entry in wrong(kind, "num_gradients", *NO_COUNTS)),
    *(entry for kind in GRADIENTS for entry in wrong(kind, "samples_per_gradient", "1", None, True, 32.0, 0)),
    *(entry for kind in (CAPUnits, LayerwiseUnits) for entry in wrong(kind, "damp", *NO_DAMPS)),
    *(entry for kind in (CAPUnits, LayerwiseUnits, LRPUnits) for entry in wrong(kind, "num_inputs", *NO_COUNTS)),
    *wrong(CAPUnits, "ridge", *NO_DAMPS),
    *wrong(CAPUnits, "compensate", "yes", None, 1, 0.0, []),
    *(entry for kind in SCORED for entry in wrong(kind, "normalize", "max", None, 1, True)),
    *wrong(RandomUnits, "seed", "0", None, True, 1.0, -1, [0]),
    *wrong(UnitSamples, "n", *NO_COUNTS, 10**12),
    *wrong(UnitSamples, "per_sample", *NO_COUNTS, given={"n": 4}),
    *wrong(UnitSamples, "num_inputs", *NO_NUMBERS, -1, 32.0, 10**12, given={"n": 4}),
    *(entry for make in (LRPUnits, relevance) for entry in wrong(make, "rule", "gamma", None, 1, True, ["epsilon"])),
    *(entry for make in (LRPUnits, relevance) for entry in wrong(make, "epsilon", *NO_NUMBERS, 0, -1.0)),
    *(entry for make in (LRPUnits, relevance) for entry in wrong(make, "classes", "label", None, 0, True, [1])),
    *(Line(f"relevance: {name}", lambda _, loss=loss, batch=batch: relevant(loss, batch), error, words)
      for name, loss, batch, error, words in NO_CLASSES),
    *wrong(UnitInputs, "n", *NO_COUNTS, 10**12),
    *wrong(losses, "candidates", None, 3, "weights", {}),
    line("layer statistics of no chunk", lambda: sum_up([], torch.device("cpu")), "are empty", error=GradientError),
    line("a cost of weights alone", lambda: MagnitudeUnits(cost=OfWeights()).check(small_targets()), "cost=OfWeights",
         "not units", error=UnsupportedError),
    *of_paths(),
    *chunks(),
]  # fmt: skip
