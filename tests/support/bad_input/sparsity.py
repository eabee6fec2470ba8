"""Bad input to targets, masks, patterns, allocations and goals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.errors import CAPError, ConfigError, DataError, PatternError, TargetError
from lightning_cap.sparsity import (
    ERK,
    Allocation,
    BlockOf,
    Global,
    MaskSet,
    NofM,
    Parameters,
    Pattern,
    PerTarget,
    Targets,
    Uniform,
    Unstructured,
    check_pattern,
    permute_channels,
)
from lightning_cap.sparsity.block_layout import BlockLayout
from lightning_cap.sparsity.cost import steps_to
from lightning_cap.sparsity.patterns import as_pattern
from lightning_cap.sparsity.permutation_search import best_order
from lightning_cap.sparsity.shards import BlockShards
from tests.support.bad_input.table import NO_COUNTS, NO_NUMBERS, Line, wrong

SHAPES = {"a": (4, 8), "b": (8, 4)}
NO_ZEROS = dict.fromkeys(SHAPES, 0)
NO_SHARES: tuple[Any, ...] = (*NO_NUMBERS, 1.0, -0.1, 50)
NO_FLAGS: tuple[Any, ...] = ("yes", None, 1, 0.0, [])


def targets() -> Targets:
    return Targets({name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()})


def ones() -> dict[str, Tensor]:
    return {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}


def line(name: str, run: Callable[[], Any], *words: str, error: type[CAPError] = ConfigError) -> Line:
    return Line(name, lambda _: run(), error, words)


#: Masks that are none, and what is said of them.
NO_MASKS: list[tuple[str, Any, str]] = [
    ("a tensor", torch.ones(4, 8, dtype=torch.bool), "masks="),
    ("a list", [torch.ones(4, 8, dtype=torch.bool)], "masks="),
    ("a string", "all", "masks='all'"),
    ("of lists", {"a": [True]}, "'a' is [True]"),
    ("of floats", {"a": torch.ones(4, 8)}, "'a' is of type torch.float32"),
    ("of whole numbers", {"a": torch.ones(4, 8, dtype=torch.uint8)}, "'a' is of type torch.uint8"),
    ("of None", {"a": None}, "'a' is None"),
    ("of another name", {"c": torch.ones(4, 8, dtype=torch.bool)}, "there is no such target"),
    ("of a number for a name", {3: torch.ones(4, 8, dtype=torch.bool)}, "3 has shape"),
    ("turned", {"a": torch.ones(8, 4, dtype=torch.bool)}, "(8, 4), but its weight has (4, 8)"),
]


def loaded(state: Any) -> None:
    MaskSet(targets()).load_state_dict(state)


def sparsity_of(pattern: Pattern) -> list[Line]:
    def check_sparsity(sparsity: Any) -> None:
        pattern.check_sparsity(sparsity)

    check_sparsity.__name__ = f"{pattern}.check_sparsity"
    return wrong(check_sparsity, "sparsity", *NO_SHARES, error=PatternError, words=["such as 0.75"])


def budget(goal: Any = 0.5, total: Any = 100) -> int:
    return Parameters().budget(goal, total)


def budgets(allocation: Allocation) -> list[Line]:
    def share_out(zeros: Any) -> Any:
        return allocation.budgets(SHAPES, NO_ZEROS, zeros)

    def given(shapes: Any = SHAPES, existing: Any = NO_ZEROS) -> Any:
        return allocation.budgets(shapes, existing, 32)

    share_out.__name__ = given.__name__ = f"{type(allocation).__name__}.budgets"
    return [
        *wrong(share_out, "zeros", "3", None, True, 3.0, -1, [3]),
        *wrong(given, "shapes", "a", None, 3, [(4, 8)]),
        *wrong(given, "existing", "a", None, 3, [0]),
        *(
            line(
                f"{given.__name__}(existing[{name!r}]={n!r})",
                lambda e=e: given(existing=e),
                f"existing[{name!r}]={n!r}",
            )
            for name in SHAPES
            for n in ("0", None, True, 1.0, -1)
            for e in [{**NO_ZEROS, name: n}]
        ),
    ]


NET = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3))
X = torch.ones(2, 4)
NET_AND_X: dict[str, Any] = {"model": NET, "example_input": X}
STATE = MaskSet(targets()).state_dict()
DAMAGED: dict[str, Any] = {
    "no mapping": 3,
    "a list": [STATE],
    "without shapes": {name: {"bits": entry["bits"]} for name, entry in STATE.items()},
    "without bits": {name: {"shape": entry["shape"]} for name, entry in STATE.items()},
    "of tensors": ones(),
    "cut short": {name: {**entry, "bits": entry["bits"][:1]} for name, entry in STATE.items()},
    "of floats": {name: {**entry, "bits": entry["bits"].float()} for name, entry in STATE.items()},
}


LINES = [
    *wrong(
        BlockShards, "targets", None, "model", nn.Linear(2, 2), {}, targets(), given={"layout": BlockLayout(SHAPES, 4)}
    ),
    *wrong(BlockShards, "layout", None, 192, True, "blocks", {}, given={"targets": targets()}),
    *wrong(MaskSet, "targets", None, "model", nn.Linear(2, 2), [nn.Linear(2, 2)], Targets, {"a": torch.ones(2)}),
    *wrong(MaskSet(targets()).update, "masks", None, 3),
    *wrong(MaskSet(targets()).replace, "masks", None, 3),
    *(line(f"MaskSet.update: {n}", lambda m=m: MaskSet(targets()).update(m), "masks", w) for n, m, w in NO_MASKS),
    *(line(f"MaskSet.replace: {n}", lambda m=m: MaskSet(targets()).replace(m), "masks", w) for n, m, w in NO_MASKS),
    *(
        line(f"check_pattern: masks {n}", lambda m=m: check_pattern(targets(), NofM(), m), "masks", w)
        for n, m, w in NO_MASKS
    ),
    line(
        "check_pattern: a mask is missing",
        lambda: check_pattern(targets(), NofM(), {"a": ones()["a"]}),
        "masks: 'b' has none",
    ),
    *(
        Line(f"MaskSet.load_state_dict: {n}", lambda _, s=s: loaded(s), DataError, ("checkpoint: its masks",))
        for n, s in DAMAGED.items()
    ),
    *(
        line(f"MaskSet.apply_to_optimizer({o!r})", lambda o=o: MaskSet(targets()).apply_to_optimizer(o), "optimizer=")
        for o in (None, "adam", [1])
    ),
    *(
        line(f"MaskSet.apply_to_copy({m!r})", lambda m=m: MaskSet(targets()).apply_to_copy(m), "model=")
        for m in (None, "model", {"a": 1})
    ),
    *wrong(check_pattern, "targets", None, nn.Linear(2, 2), "model", given={"pattern": NofM()}),
    *wrong(check_pattern, "pattern", None, "2:4", 124, NofM, error=PatternError, given={"targets": targets()}),
    *wrong(NofM, "n", "2", None, True, [2], 2.0, float("nan"), error=PatternError),
    *wrong(NofM, "m", "4", None, True, [4], 4.0, 124, error=PatternError),
    *wrong(NofM, "n", 0, -1, 4, 5, error=PatternError),
    *wrong(BlockOf, "n", *NO_COUNTS, 1, error=PatternError),
    *(
        line(f"as_pattern({p!r})", lambda p=p: as_pattern(p), "pattern=", w, error=PatternError)
        for p, w in [
            ("2:4", "NofM(n=2, m=4)"),
            (124, "2:4"),
            (NofM, "this is a class"),
            ([2, 4], "NofM"),
            (object, "NofM"),
        ]
    ),
    *sparsity_of(Unstructured()),
    *sparsity_of(NofM()),
    *(
        entry
        for kind in (Global, Uniform, ERK, PerTarget)
        for entry in wrong(kind, "min_density", "0.1", None, True, 1.0, -0.1, float("nan"), [0.1])
    ),
    *wrong(PerTarget, "sparsities", None, "a", [0.5], 0.5, Global),
    *(
        line(f"PerTarget({{'a': {s!r}}})", lambda s=s: PerTarget({"a": s}), "sparsities['a']=", "[0, 1)")
        for s in ("0.5", None, True, 1.0, -0.1, float("nan"), [0.5])
    ),
    *(
        line(f"PerTarget({{{key!r}: 0.5}})", lambda key=key: PerTarget({key: 0.5}), "sparsities=", "string")
        for key in (3, None, "", True)
    ),
    *(entry for allocation in (Global(), Uniform(), ERK(), PerTarget({"a": 0.5})) for entry in budgets(allocation)),
    *wrong(Parameters().prices, "shapes", None, "a", 3, ["a"]),
    *wrong(Parameters().total, "shapes", None, "a", 3, ["a"]),
    *wrong(Parameters().saved, "zeros", None, "a", 3, ["a"], given={"shapes": SHAPES}),
    *wrong(Parameters().is_exceeded, "saved", None, "3", True, 3.0, -1, given={"goal": 0.5, "total": 64}),
    *wrong(budget, "goal", *NO_NUMBERS, -0.1, 1.5),
    *wrong(budget, "total", "3", None, True, 3.0, -1),
    *wrong(steps_to, "goal", "0.5", None, 2.0, given={"start": 0.0, "num_steps": 2}),
    *wrong(steps_to, "start", "0.5", None, float("nan"), given={"goal": 0.5, "num_steps": 2}),
    *wrong(steps_to, "path", None, True, "cubic", ["linear"], 2, given={"goal": 0.5, "start": 0.0, "num_steps": 2}),
    *wrong(steps_to, "num_steps", *NO_COUNTS, 10**12, given={"goal": 0.5, "start": 0.0}),
    *wrong(BlockLayout, "shapes", None, [(4, 8)], "a", given={"block_size": 4}),
    *wrong(BlockLayout, "block_size", *NO_COUNTS, given={"shapes": SHAPES}),
    *wrong(BlockLayout, "group_size", "4", None, True, 4.0, 0, given={"shapes": SHAPES, "block_size": 4}),
    *wrong(BlockLayout, "by_row", *NO_FLAGS, given={"shapes": SHAPES, "block_size": 4}),
    *wrong(permute_channels, "model", None, "vit", 3, NET.state_dict(), given={"example_input": X}, error=TargetError),
    *wrong(permute_channels, "example_input", None, "x", 3, float("nan"), given={"model": NET}),
    *wrong(permute_channels, "pattern", None, "2:4", 124, NofM, BlockOf(4), given=NET_AND_X, error=PatternError),
    *wrong(permute_channels, "scores", "w", 3, [torch.ones(8, 4)], {}, given=NET_AND_X),
    *(
        line(f"permute_channels: scores of {n}", lambda s=s: permute_channels(**NET_AND_X, scores=s), "scores: ", w)
        for n, s, w in [
            ("another weight", {"9.weight": torch.ones(8, 4)}, "'9.weight' is of shape (8, 4)"),
            ("another shape", {"1.weight": torch.ones(4, 8)}, "the weight has shape (8, 8)"),
            ("a number", {"1.weight": 3}, "'1.weight' is 3"),
            ("no name", {3: torch.ones(8, 8)}, "3 is"),
            ("negative ones", {"1.weight": -torch.ones(8, 8)}, "negative"),
            ("NaN", {"1.weight": torch.full((8, 8), torch.nan)}, "NaN"),
        ]
    ),
    *wrong(permute_channels, "include", "*", 3, [3], [], given=NET_AND_X, error=TargetError),
    *wrong(permute_channels, "exclude", "*", 3, [3], given=NET_AND_X, error=TargetError),
    *wrong(best_order, "scores", None, [1.0], torch.ones(8), torch.ones(2, 6), given={"keep": 2, "group": 4}),
    *wrong(best_order, "keep", *NO_COUNTS, 4, given={"scores": torch.ones(2, 8), "group": 4}),
    *wrong(best_order, "group", *NO_COUNTS, 1, given={"scores": torch.ones(2, 8), "keep": 2}),
]
