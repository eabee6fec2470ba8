"""Bad input to what measures times: the benchmark of exported models, and the latency of units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_cap.errors import CAPError, ConfigError, DataError, UnsupportedError
from lightning_cap.export.benchmark import benchmark, print_benchmark
from lightning_cap.sparsity import Latency, Units
from lightning_cap.utilities.machine import require_device
from tests.support.bad_input.table import NO_COUNTS, Line, wrong
from tests.support.clocks import SlowNet, slow_units

MODEL = nn.Linear(2, 2).eval()
MODELS = {"dense": MODEL, "other": MODEL}
NET = SlowNet().eval()
UNITS = slow_units(NET)
TIMED = {"model": NET, "units": UNITS, "example_input": torch.ones(1, 3)}
MEASURED = {"models": MODELS, "example_input": torch.ones(1, 2)}


def device(device: Any) -> None:
    require_device("device", device)


def measure(name: str, word: str, **given: Any) -> Line:
    return Line(f"benchmark: {name}", lambda _: benchmark(**{**MEASURED, **given}), ConfigError, (word,))


def prepare(name: str, word: str, error: type[CAPError] = ConfigError, table: str | None = None, **given: Any) -> Line:
    """With a table in a file, which is there before."""

    def run(folder: Path) -> None:
        cost = Latency(table=None if table is None else folder / "latency.json")
        cost.prepare(**{**TIMED, **given})

    def write(folder: Path) -> None:
        if table is not None:
            (folder / "latency.json").write_text(table)

    return Line(f"Latency.prepare: {name}", run, error, (word,), write)


def into_a_folder(folder: Path) -> None:
    Latency(table=folder)


LINES = [
    *wrong(Latency, "device", None, 3, True, "", "gpu", "cuda:77", "meta", ["cpu"]),
    *wrong(Latency, "batch_size", *NO_COUNTS),
    *wrong(Latency, "table", 3, True, "", " ", ["latency.json"], 1.5),
    *wrong(Latency, "threads", "2", True, 0, -1, 2.0, [1], float("nan")),
    Line("Latency: a folder for the table", into_a_folder, ConfigError, ("table=", "this is a folder")),
    *[prepare(f"{value!r:.9} for a model", "model=", model=value) for value in (None, "net", nn.Linear)],
    *[prepare(f"{value!r:.9} for units", "units=", units=value) for value in (None, ["first"], Units)],
    *[prepare(f"{value!r:.9} for a folder", "folder=", folder=value) for value in ("runs", 3)],
    *[
        prepare(f"{value!r:.9} for an example", "example_input=", example_input=value)
        for value in (None, 3, [], torch.ones(()))
    ],
    prepare("an empty example", "example_input=", example_input=torch.ones(0, 3)),
    prepare("an example that does not fit", "batch_size=1", UnsupportedError, example_input=torch.ones(1, 4)),
    prepare("a table that is cut off", "it is torn", DataError, table='{"record": "lat'),
    prepare("a table that is something else", "is not a record", DataError, table="[1, 2]\n"),
    prepare("a table of another version", "version 99", DataError, table='{"record": "latency", "version": 99}\n'),
    prepare("a table without times", "no field", DataError, table='{"record": "latency", "version": 1}\n'),
    Line(
        "Latency.unit_prices: not prepared",
        lambda _: Latency().unit_prices(UNITS, {}),
        ConfigError,
        ("nothing is timed yet",),
    ),
    *wrong(Latency().unit_prices, "units", None, "units", ["first"], given={"shapes": {}}),
    *wrong(Latency().unit_prices, "shapes", None, 3, [1], given={"units": UNITS}),
    Line(
        "Latency: weights", lambda _: Latency().prices({"w": (2, 2)}), UnsupportedError, ("cost=Latency", "CAPUnits()")
    ),
    *wrong(device, "device", None, 3, True, "", "gpu", "cuda:77", "meta", ["cpu"], torch.device, object),
    *wrong(benchmark, "models", None, "dense", [MODEL], MODEL, {}, {"dense": MODEL}, given=MEASURED),
    measure("no function", "models['other']=3", models={"dense": MODEL, "other": 3}),
    measure("a class", "models['other']=Linear", models={"dense": MODEL, "other": nn.Linear}),
    measure(
        "training mode",
        "models['other']=Linear: it is in training mode",
        models={"dense": MODEL, "other": nn.Linear(2, 2)},
    ),
    *wrong(benchmark, "example_input", None, 3, "image", given=MEASURED),
    measure("no batch", "example_input: a tensor of shape (2,)", example_input=torch.ones(2)),
    measure("an empty batch", "example_input: a tensor of shape (0, 2)", example_input=torch.ones(0, 2)),
    measure("no tensor", "example_input: there is no tensor (n, ...) in {'x': 1}", example_input={"x": 1}),
    measure(
        "a named argument of another model", "'dense' cannot take a batch of 1", example_input={"x": torch.ones(1, 2)}
    ),
    measure(
        "an argument without values",
        "'input' has values that are not finite",
        example_input={"input": torch.ones(1, 2) / 0},
    ),
    *wrong(benchmark, "batch_sizes", None, 3, "1", {"a": 1}, [], given=MEASURED),
    *[measure(f"a batch of {value!r:.20}", "batch_sizes=", batch_sizes=[value]) for value in NO_COUNTS[:6]],
    *[measure(f"{value!r:.20} in a batch", "batch_sizes=", batch_sizes=[value]) for value in (32.0, 0, -1)],
    *wrong(benchmark, "threads", "2", True, 0, -1, 2.0, [1], given=MEASURED),
    *wrong(benchmark, "seconds", None, "2", True, 0, -1.0, float("nan"), float("inf"), given=MEASURED),
    *wrong(benchmark, "files", 3, "other", ["other"], given=MEASURED),
    *wrong(benchmark, "flops", 3, "other", ["other"], given=MEASURED),
    *wrong(benchmark, "sparse_kernels", None, 3, "other", given=MEASURED),
    measure("a file of another model", "files: 'third' is none of the models", files={"third": Path("w")}),
    measure("a file that is not there", "files: 'other' is", files={"other": Path("w")}),
    measure("FLOPs of None", "flops['other']=None", flops={"other": None}),
    *wrong(print_benchmark, "records", None, 3, "records"),
    Line("print_benchmark: text", lambda _: print_benchmark(["a"]), ConfigError, ("records=", "BenchmarkRecord")),
    *wrong(print_benchmark, "console", 3, "stdout", given={"records": []}),
]
