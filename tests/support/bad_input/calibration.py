"""Bad input to collectors, statistics, calibration batches, the Fisher and the plan of its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_cap.calibration import (
    CalibrationBatches,
    GradientCollector,
    GradientSamples,
    InputCollector,
    LayerInputs,
)
from lightning_cap.errors import ConfigError
from lightning_cap.fisher.blocks import EmpiricalFisher
from lightning_cap.fisher.matrix_free import GradientRows
from lightning_cap.fisher.memory_plan import Deployment, MemoryModel, plan_event, planned_for
from lightning_cap.pruners import CAP, MFAC
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities.memory import parse_bytes
from lightning_cap.utilities.rng import Domain
from tests.support.bad_input.table import NO_COUNTS, NO_NUMBERS, Line, wrong

NO_FUNCTIONS: tuple[Any, ...] = ("loss", None, 3, [], {})
NO_OBJECTS: tuple[Any, ...] = ("x", None, 3, [], nn.Identity)
CPU = torch.device("cpu")
LINEAR = nn.Linear(6, 4)
nn.init.ones_(LINEAR.weight)  # shown in names, which are the same in every process
LAYOUT = Targets.from_model(LINEAR, include=["weight"]).blocks(8)


def entered(machine: object) -> None:
    with planned_for(machine):  # type: ignore[arg-type]
        pass


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return torch.as_tensor(model(batch[0]).square().mean())


def batches(size: int = 4) -> list[Any]:
    return [(torch.ones(size, 6),)]


def loader(size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(size, 6)), batch_size=4)


def targets() -> Targets:
    return Targets({"weight": LINEAR.weight})


def collector(kind: type[Any], count: str) -> dict[str, Any]:
    return {"model": LINEAR, "targets": targets(), "loss": loss, "batches": batches(), count: 4}


def collectors() -> list[Line]:
    lines = []
    for kind, count in ((GradientCollector, "num_gradients"), (InputCollector, "num_inputs")):
        given = collector(kind, count)
        lines += [
            *wrong(kind, "model", *NO_OBJECTS, given=given),
            *wrong(kind, "targets", *NO_OBJECTS, LINEAR, {"weight": LINEAR.weight}, given=given),
            *wrong(kind, "loss", *NO_FUNCTIONS, given=given),
            *wrong(kind, "batches", "x", None, 3, {}, torch.ones(2, 6), DataLoader, given=given),
            *wrong(kind, count, *NO_COUNTS, given=given),
            *wrong(kind, "context", "autocast", None, 3, given=given),
            *wrong(kind, "progress", "bar", 3, [], given=given),
            *wrong(kind, "trial", "x", 3, {}, given=given),
        ]
    given = collector(GradientCollector, "num_gradients")
    return [
        *lines,
        *wrong(GradientCollector, "samples_per_gradient", *NO_COUNTS, given=given),
        *wrong(GradientCollector, "scale", *NO_NUMBERS, 0, -1.0, given=given),
    ]


def statistics() -> list[Line]:
    return [
        *wrong(GradientSamples, "n", *NO_COUNTS),
        *wrong(GradientSamples, "per_sample", *NO_COUNTS, given={"n": 4}),
        *wrong(GradientSamples, "per_sample", 10**9, 2**62, given={"n": 4096}, words=("n=4096", "16,777,216 samples")),
        *wrong(GradientSamples, "n", 10**12, words=("Give fewer",)),
        *wrong(LayerInputs, "n", *NO_COUNTS, 10**12),
    ]


def drawing() -> list[Line]:
    given = {"source": loader(), "num_samples": 8, "samples_per_gradient": 1, "seed": 0, "event": 0}
    return [
        *wrong(CalibrationBatches, "source", "x", None, 3, {}, torch.ones(3), DataLoader, given=given),
        *wrong(CalibrationBatches, "num_samples", *NO_COUNTS, 10**12, given=given),
        *wrong(CalibrationBatches, "samples_per_gradient", *NO_COUNTS, given=given),
        *wrong(CalibrationBatches, "most_gradients", *NO_COUNTS, given=given),
        *wrong(CalibrationBatches, "seed", *NO_NUMBERS, -1, 0.0, given=given),
        *wrong(CalibrationBatches, "event", *NO_NUMBERS, -1, given=given),
        *wrong(CalibrationBatches, "use", "HEAL", 6, True, [], object, Domain, given=given),
        *wrong(CalibrationBatches, "sampler", "x", 3, {}, given=given),
    ]


def fisher() -> list[Line]:
    lines = []
    given = {"layout": LAYOUT, "device": CPU}
    for kind in (EmpiricalFisher, GradientRows):
        lines += [
            *wrong(kind, "layout", *NO_OBJECTS, targets(), given=given),
            *wrong(kind, "device", "cpu", None, 0, given=given),
            *wrong(kind, "storage_device", "cpu", 0, given=given),
            *wrong(kind, "row_chunk", *NO_COUNTS, given=given),
            *wrong(kind, "storage", "tiles", None, 1, [], given=given),
            *wrong(kind, "allow_tf32", "yes", None, 1, given=given),
        ]
    plan = {"model": MemoryModel(8, 3, 4, "packed"), "blocks": torch.arange(3), "device": CPU}
    return [
        *lines,
        *wrong(plan_event, "model", *NO_OBJECTS, given=plan),
        *wrong(plan_event, "blocks", "x", None, 3, [0, 1], given=plan),
        *wrong(plan_event, "device", "cpu", None, 0, given=plan),
        *wrong(plan_event, "max_memory", "1GB", True, 1.5, 0, given=plan),
        *wrong(Deployment, "device", "cuda", None, 0),
        *(
            entry
            for name in ("device_bytes", "host_bytes")
            for entry in wrong(Deployment, name, "80GB", True, 1.5, 0, -1, given={"device": CPU})
        ),
        *wrong(Deployment, "processes", *NO_COUNTS, given={"device": CPU}),
        *wrong(entered, "machine", "cuda", 8, [1], object()),
        *[
            Line(
                f"parse_bytes({value!r})",
                lambda _, v=value: parse_bytes(v, "max_memory"),
                ConfigError,
                ("max_memory=",),
            )  # type: ignore[misc]
            for value in ("", "much", "-1GB", "1 kg", "nan", "inf", 0, -5, True, 1.5e300, [1], {"GB": 1})
        ],
    ]


def too_large() -> list[Line]:
    """Numbers that would take gigabytes or minutes: each is refused in milliseconds."""

    def drawn(_: Path) -> None:
        list(CalibrationBatches(loader(), 9, 9, 0, 0))

    def grouped(_: Path) -> None:
        list(GradientCollector(LINEAR, targets(), loss, batches(), 1, 5))

    def planned(pruner: Any) -> None:
        pruner.plan(Targets({"weight": torch.ones(2000, 2000)}))

    return [
        Line(
            "more samples in a gradient than in the data set",
            drawn,
            ConfigError,
            ("samples_per_gradient=9", "8 samples"),
        ),
        Line(
            "more samples in a gradient than in a batch", grouped, ConfigError, ("samples_per_gradient=5", "4 samples")
        ),
        *[
            Line(
                f"plan of block_size=10**9: {type(pruner).__name__} {words[0]}",
                lambda _, p=pruner: planned(p),
                ConfigError,
                words,
            )  # type: ignore[misc]
            for pruner, words in (
                (CAP(block_size=10**9), ("block_size", "smaller")),
                (CAP(block_size=10**9, max_memory="1GB"), ("max_memory", "may be used")),
                (MFAC(block_size=10**9, num_gradients=2**20), ("block_size", "smaller")),
            )
        ],
    ]


LINES = [*collectors(), *statistics(), *drawing(), *fisher(), *too_large()]
