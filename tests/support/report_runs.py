"""Folders of runs and comparisons as they are left behind, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lightning_cap.comparison.records import RESULTS, SURFACE, ComparisonRecord, GridPoint, SurfaceRecord, save_masks
from lightning_cap.export.records import EXPORTS, ExportRecord
from lightning_cap.trainer.records import EVENTS, EventRecord
from lightning_cap.trainer.run_records import (
    CYCLES,
    FINETUNED,
    RUN,
    CycleRecord,
    FinetunedRecord,
    LayerRecord,
    PlanRecord,
    RunRecord,
)
from lightning_cap.utilities.records import write_records
from tests.support.comparison_records import UNPRUNED, record

GOALS = {2: 0.5, 4: 0.75}
LAYERS = (
    LayerRecord("model.stem.weight", (8, 3, 4, 4), "first", 400),
    LayerRecord("model.blocks.0.fc.weight", (16, 8), "", 4000),
    LayerRecord("model.blocks.1.fc.weight", (16, 8), "", 4000),
    LayerRecord("model.head.weight", (10, 16), "last", 600),
)
TARGETS = [layer.name for layer in LAYERS if not layer.dense]


def run_record(**changes: Any) -> RunRecord:
    given = RunRecord(
        state="finished",
        started="2026-01-02T03:04:05.678901+00:00",
        ended="2026-01-02T04:04:05.678901+00:00",
        epoch=0,
        max_epochs=6,
        schedule={str(epoch): goal for epoch, goal in GOALS.items()},
        counted="sparsity",
        metric="val/acc",
        model="small_vit",
        weights=202_000,
        layers=LAYERS,
        flops=10_000,
        plan=PlanRecord("cpu", 3_000_000, 8_000_000_000, "cpu", 0, 1, 128, None),
        settings={"pruner": "CAP", "pruner.damp": "1e-06"},
        environment={"lightning_cap": "0.1.0", "torch": "2.6.0", "machine": "somewhere"},
    )
    return replace(given, **changes)


def event_record(epoch: int, goal: float, **changes: Any) -> EventRecord:
    given = EventRecord(
        epoch=epoch,
        goal=goal,
        sparsity=goal,
        predicted_loss=goal / 10,
        unit="gradients",
        samples=128,
        skipped=0,
        grown_back=0,
        peak_bytes=3_000_000,
        measured_bytes=2_500_000,
        seconds={"plan": 0.1, "collect": 2.0, "solve": 1.5, "apply": 0.2},
        stats={},
        before={"val/acc": 0.98, "val/loss": 0.1},
        after={"val/acc": 0.98 - goal / 20, "val/loss": 0.1 + goal / 8},
        sparsities={TARGETS[0]: goal - 0.1, TARGETS[1]: goal + 0.1},
    )
    return replace(given, **changes)


def cycle_records(folder: Path | None = None, suffix: str = "") -> list[CycleRecord]:
    """Of the model before the first event, and of two cycles, whose files are in ``folder``."""
    found = [CycleRecord(0.0, 2, 0.98, 0.0)]
    for epochs, (goal, value) in zip((4, 6), ((0.5, 0.975), (0.75, 0.96)), strict=True):
        names = [f"sparsity={goal:.2f}{suffix}{ending}" for ending in (".ckpt", ".safetensors")]
        paths = ["", ""] if folder is None else [str(folder / name) for name in names]
        found.append(CycleRecord(goal, epochs, value, goal, False, *paths))
    return found


METRICS = """epoch,lr-AdamW,step,train/loss,val/acc,val/loss
,0.003,0,,,
0,,9,1.5,0.70,0.9
,0.002,10,,,
1,,19,1.1,0.98,0.1
,0.003,20,,,
2,,29,1.0,0.97,0.12
,0.001,50,,,
5,,59,0.9,0.96,0.13
"""


def write_run(folder: Path, suffix: str = "", events: Sequence[EventRecord] | None = None, **changes: Any) -> Path:
    """A run that has ended, in ``checkpoints`` of a folder, with the CSV logger's file beside; the folder is returned."""
    place = folder / "checkpoints"
    place.mkdir(parents=True, exist_ok=True)
    cycles = cycle_records(place, suffix)
    for cycle in cycles[1:]:
        Path(cycle.checkpoint).write_bytes(b"x" * 4000)
        Path(cycle.weights).write_bytes(b"x" * 1500)
    given = [event_record(epoch, goal) for epoch, goal in GOALS.items()] if events is None else events
    for name, records in ((RUN, [run_record(**changes)]), (EVENTS, given), (CYCLES, cycles)):
        write_records(place / f"{Path(name).stem}{suffix}.jsonl", records)
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "hparams.yaml").write_text("lr: 0.003\n")
    return folder


def add_finetuned(folder: Path) -> None:
    """Fine-tuning of the two checkpoints of `write_run`."""
    place = folder / "checkpoints"
    records = [
        FinetunedRecord(
            goal=goal, sparsity=goal, flops_saved=0.8 * goal, metric="val/acc", before=before, after=before + 0.004, epochs=10,
            source=str(place / f"sparsity={goal:.2f}.ckpt"), weights=str(place / f"sparsity={goal:.2f}-finetuned.safetensors"),
        )
        for goal, before in ((0.5, 0.975), (0.75, 0.96))
    ]  # fmt: skip
    write_records(place / FINETUNED, records)


def add_export(folder: Path, path: str = "sparsity=0.75.onnx") -> None:
    place = folder / "checkpoints" / "export"
    place.mkdir()
    (place / path).write_bytes(b"x" * 900)
    export = ExportRecord(
        format="onnx", path=path, goal=0.75, sparsity=0.75, architecture="", bytes=900, dense_bytes=1000, inputs=8,
        difference=1e-6, tolerance=1e-4, weights=2, zeros_equal=2,
    )  # fmt: skip
    write_records(place / EXPORTS, [export])


def comparison_records() -> list[ComparisonRecord]:
    every = [(name, goal, seed) for name in ("A", "B") for goal in (0.5, 0.9) for seed in (0, 1)]
    return [UNPRUNED, *(record(name, goal, seed, 0.97 - goal / 10 - seed / 50) for name, goal, seed in every)]


def write_comparison(folder: Path, records: Sequence[ComparisonRecord] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / RESULTS, comparison_records() if records is None else records)
    return folder


def with_planes(folder: Path) -> list[ComparisonRecord]:
    """Records of a comparison of one seed with a grid, and its masks, loss surface and average Fisher block in a folder."""
    given = [record(name, 0.5, 0, 0.9) for name in ("A", "B")]
    given = [replace(one, masks=f"masks/{one.label}.safetensors") for one in given]
    for place, one in enumerate(given):
        save_masks(folder / one.masks, {"w": torch.arange(16) % 2 == place})
    of = (given[0].fingerprint, given[1].fingerprint)
    loss = ((1.0, 2.0, 4.0), (2.0, 3.0, 5.0), (4.0, 5.0, 9.0))
    corners = {"unpruned": 1.0, "A": 2.0, "B": 2.0}
    surface = SurfaceRecord(pruners=("A", "B"), sparsity=0.5, axis=(0.0, 0.5, 1.0), loss=loss, corners=corners, of=of)
    write_records(folder / SURFACE, [surface])
    save_file({"all": torch.eye(4) * 1e-4 + 1e-7}, folder / "fisher_block.safetensors", {"of": of[0]})
    grid = [record("A", 0.5, 0, 0.8 + value, GridPoint("damp", value)) for value in (0.01, 0.1)]
    return [UNPRUNED, *given, *grid]
