"""Bad input to what makes models smaller, and writes and reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cap.errors import ConfigError, DataError
from lightning_cap.export import load, save_shrunk, shrink
from lightning_cap.sparsity.shrinking import shrink_in_place
from lightning_cap.sparsity.units import Slice, UnitGroup, Units
from tests.support.bad_input.table import Line, wrong

ROWS = torch.arange(4).view(4, 1)
UNITS = Units(
    [
        UnitGroup(
            "0", "neuron", 4, (Slice("0.weight", 0, ROWS), Slice("0.bias", 0, ROWS)), (), (Slice("2.weight", 1, ROWS),)
        )
    ]
)
HALF = {"0": torch.arange(4) < 2}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


MODEL = model()
MASKS = UNITS.masks(UNITS.targets(MODEL).shapes, HALF)


def shrinking(model: Any = MODEL, masks: Any = MASKS, units: Any = UNITS, example_input: Any = None) -> None:
    """Named as `shrink`, with a model."""
    shrink(model, masks, units, example_input)


def cutting(model: Any = MODEL, units: Any = UNITS, kept: Any = None) -> None:
    """Named as `shrink_in_place`, with a model."""
    shrink_in_place(model, units, HALF if kept is None else kept)


def writing(model: Any = None, path: Any = "s.safetensors", model_args: Any = None) -> None:
    """Named as `save_shrunk`, with a model."""
    save_shrunk(shrink(MODEL, MASKS, UNITS) if model is None else model, path, model_args)


def masks(name: str, value: object) -> Line:
    return Line(
        f"shrink: masks of {name}", lambda _: shrinking(masks={**MASKS, "0.bias": value}), ConfigError, ("masks: '0.bias' ",)
    )  # fmt: skip


def kept(name: str, value: dict[Any, Any], *words: str) -> Line:
    return Line(f"shrink_in_place: kept of {name}", lambda _: cutting(kept=value), ConfigError, ("kept: ", *words))


def broken() -> dict[str, Tensor]:
    return {**MASKS, "0.bias": torch.tensor([True, True, True, False])}


def written(folder: Path) -> None:
    save_shrunk(shrink(MODEL, MASKS, UNITS), folder / "s.safetensors")


def foreign(folder: Path) -> None:
    written(folder)
    (folder / "s.json").write_text('{"epoch": 3}\n')


def reading(folder: Path) -> None:
    load(folder / "s.safetensors", MODEL)


LINES = [
    *wrong(shrinking, "model", None, 3, "model", {"w": torch.ones(2)}, nn.Linear),
    *wrong(shrinking, "masks", None, 3, "masks", [torch.ones(2)], {}, {3: torch.ones(2)}, True),
    *wrong(shrinking, "units", 3, "units", {"0": 3}, [UNITS], Units, True),
    *wrong(shrinking, "example_input", 3, "x", True, float("nan"), (3, 224, 224), {}, []),
    masks("numbers", torch.ones(4)),
    masks("another shape", torch.ones(5, dtype=torch.bool)),
    masks("a list", [True] * 4),
    masks("None", None),
    Line(
        "shrink: another model",
        lambda _: shrinking(nn.Linear(3, 4)),
        ConfigError,
        ("'0.weight' is no parameter of the model",),
    ),
    Line(
        "shrink: a broken unit", lambda _: shrinking(masks=broken()), ConfigError, ("masks: 1 units of '0', first 2",)
    ),
    Line(
        "shrink: no unit left",
        lambda _: shrinking(masks={name: torch.zeros_like(mask) for name, mask in MASKS.items()}),
        ConfigError,
        ("'0' has none of its 4 units left",),
    ),
    Line("shrink: no example", lambda _: shrinking(units=None), ConfigError, ("example_input=None",)),
    *wrong(cutting, "model", None, 3, "model", nn.Linear),
    *wrong(cutting, "units", None, 3, "units", {"0": 3}, Units),
    *wrong(cutting, "kept", 3, "kept", [HALF], HALF["0"]),
    kept("another group", {"1": HALF["0"]}, "there is no group '1'"),
    kept("a number for a name", {1: HALF["0"]}, "there is no group 1"),
    kept("numbers", {"0": torch.ones(4)}, "'0' is tensor"),
    kept("another size", {"0": torch.ones(3, dtype=torch.bool)}, "'0' is tensor"),
    kept("a list", {"0": [True] * 4}, "'0' is [True, True, True, True]"),
    kept("no unit", {"0": torch.zeros(4, dtype=torch.bool)}, "'0' has none of its 4 units left"),
    *wrong(writing, "model", 3, "model", {"w": torch.ones(2)}, nn.Linear),
    *wrong(writing, "path", None, 3, True, ["s"], "", "s", "s.pt", "folder/", object),
    *wrong(writing, "model_args", 3, "depth", [("depth", 2)], True, {3: 3}, {"depth": MODEL}, {"depth": [[1]]}),
    Line("save_shrunk: a dense model", lambda _: writing(model()), ConfigError, ("it was not made by shrink",)),
    *wrong(load, "path", None, 3, True, ["s"], "", "s.pt", given={"model": MODEL}),
    *wrong(load, "model", 3, "model", {"w": torch.ones(2)}, nn.Linear, given={"path": "s.safetensors"}),
    Line("load: no file", reading, DataError, ("s.json", "cannot be read")),
    Line("load: a foreign file", reading, DataError, ("s.json", "is not a record"), foreign),
    Line("load: no model", lambda folder: load(folder / "s.safetensors"), ConfigError, ("model=None",), written),
    Line(
        "load: another model",
        lambda folder: load(folder / "s.safetensors", nn.Linear(3, 4)),
        ConfigError,
        ("model=Linear", "another model"),
        written,
    ),
]
