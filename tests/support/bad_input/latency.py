"""Bad input to what measures times: the benchmark of exported models, and the latency of units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_cap.errors import ConfigError
from lightning_cap.export.benchmark import benchmark, print_benchmark
from lightning_cap.utilities.machine import require_device
from tests.support.bad_input.table import NO_COUNTS, Line, wrong

MODEL = nn.Linear(2, 2).eval()
MODELS = {"dense": MODEL, "other": MODEL}
MEASURED = {"models": MODELS, "example_input": torch.ones(1, 2)}


def device(device: Any) -> None:
    require_device("device", device)


def measure(name: str, word: str, **given: Any) -> Line:
    return Line(f"benchmark: {name}", lambda _: benchmark(**{**MEASURED, **given}), ConfigError, (word,))


LINES = [
    *wrong(device, "device", None, 3, True, "", "gpu", "cuda:77", "meta", ["cpu"], torch.device, object),
    *wrong(benchmark, "models", None, "dense", [MODEL], MODEL, {}, {"dense": MODEL}, given=MEASURED),
    measure("no function", "models['other']=3", models={"dense": MODEL, "other": 3}),
    measure("a class", "models['other']=Linear", models={"dense": MODEL, "other": nn.Linear}),
    measure(
        "training mode",
        "models['other']=Linear: it is in training mode",
        models={"dense": MODEL, "other": nn.Linear(2, 2)},
    ),
    *wrong(benchmark, "example_input", None, 3, "image", [1.0], {"x": 1}, given=MEASURED),
    measure("no batch", "example_input of shape (2,)", example_input=torch.ones(2)),
    measure("an empty batch", "example_input of shape (0, 2)", example_input=torch.ones(0, 2)),
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
