"""The plan of a pruning event of ViT-Tiny against the event itself, and the plan of DeiT-Small.

    python benchmarks/plan.py --threads 1

Both are of CAP with blocks of 192, on noise in place of images, which changes neither bytes nor seconds; ``--data`` names a folder
of images for the event. Plan and event run one after the other in processes of their own. Measured are the phases of the event as
its record has them, with one thread in seconds of the processor, which other programs do not change; and the high-water mark of
resident memory (``VmHWM``) less what was resident before. Prints tables and writes ``results/plan.json``.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from machine import machine
from meter import status

from lightning_cap import CAPPruningCallback, VisionClassifier
from lightning_cap.data import ImageNetDataModule
from lightning_cap.planning import plan_fit
from lightning_cap.planning.machine import Settings
from lightning_cap.planning.random_data import random_data
from lightning_cap.pruners import CAP
from lightning_cap.trainer.records import EventRecord
from lightning_cap.utilities.memory import release_memory
from lightning_cap.utilities.records import read_records

ROOT = Path(__file__).resolve().parent.parent
CLASSES, GOAL, PHASES = 1000, 0.5, ("collect", "solve", "apply")


class Watch(pl.Callback):
    """Marks what is resident before the event, or reads the peak after it and ends the run."""

    def __init__(self, ends: Watch | None = None) -> None:
        self.before, self.peak, self.first = 0, 0, ends

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.first is None:
            gc.collect()
            release_memory(torch.device("cpu"))
            self.before = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
        else:
            self.peak = status("VmHWM") - self.first.before
            trainer.should_stop = True
            trainer.limit_train_batches = 0


def configured(callbacks: list[pl.Callback], folder: str) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=0,
        logger=False,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def pruning(gradients: int, folder: str) -> CAPPruningCallback:
    return CAPPruningCallback({0: GOAL}, CAP(num_gradients=gradients, damp=1e-5), evaluate=False, dirpath=folder)


def data(folder: str | None, batch: int) -> ImageNetDataModule:
    return ImageNetDataModule(root=folder, batch_size=batch, num_workers=0, num_classes=None if folder else CLASSES)


def plan(model: str, gradients: int, batch: int, folder: str | None) -> dict[str, Any]:
    """Of one event."""
    with tempfile.TemporaryDirectory() as place:
        trainer = configured([pruning(gradients, place)], place)
        found = plan_fit(trainer, VisionClassifier(model, num_classes=CLASSES), data(folder, batch), Settings())
    (pruner,) = found.pruning
    assert pruner.seconds is not None
    return {"weights": found.choices[0].pruned, "memory": vars(pruner.memory), "seconds": dict(pruner.seconds)}


def event(model: str, gradients: int, batch: int, folder: str | None) -> dict[str, Any]:
    """The event itself, after a small one that loads all libraries."""
    module = VisionClassifier(model, num_classes=CLASSES)
    given: pl.LightningDataModule = data(folder, batch)
    if folder is None:
        given, _ = random_data(module, given, 1)
    with tempfile.TemporaryDirectory() as place:
        first = Watch()
        last = Watch(first)
        trainer = configured([first, pruning(gradients, place), last], place)
        trainer.fit(module, datamodule=given)
        (record,) = read_records(Path(place) / "events.jsonl", EventRecord)
    return {"bytes": last.peak, "planned_bytes": record.peak_bytes, "seconds": dict(record.seconds)}


def in_fresh_process(what: str, case: dict[str, Any], threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", json.dumps([what, case]), "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(planned: dict[str, Any], measured: dict[str, Any]) -> str:
    lines = ["| | planned | measured | planned : measured |", "|---|---:|---:|---:|"]
    pairs = [("peak memory, MiB", planned["memory"]["peak_bytes"] / 2**20, measured["bytes"] / 2**20)]
    pairs += [(f"{phase}, s", planned["seconds"][phase], measured["seconds"][phase]) for phase in PHASES]
    totals = [sum(found["seconds"][phase] for phase in PHASES) for found in (planned, measured)]
    for name, one, two in [*pairs, ("all phases, s", *totals)]:
        lines.append(f"| {name} | {one:,.1f} | {two:,.1f} | {one / two:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="of the event")
    parser.add_argument("--larger", default="deit_small_patch16_224", help="that is planned alone")
    parser.add_argument("--gradients", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--data", help="folder with train/ and val/")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/plan.json")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    if given.case:
        warnings.simplefilter("ignore")
        what, case = json.loads(given.case)
        time.perf_counter = time.process_time if what == "event" and given.threads == 1 else time.perf_counter
        print(json.dumps({"plan": plan, "event": event}[what](**case)))
        return None
    case = {"gradients": given.gradients, "batch": given.batch, "folder": given.data}
    planned = in_fresh_process("plan", {"model": given.model, **case}, given.threads)
    measured = in_fresh_process("event", {"model": given.model, **case}, given.threads)
    larger = in_fresh_process("plan", {"model": given.larger, **{**case, "gradients": 4096}}, given.threads)
    out = {
        "machine": machine(),
        "settings": {"gradients": given.gradients, "batch": given.batch, "threads": given.threads, "goal": GOAL},
        "event": {"model": given.model, "planned": planned, "measured": measured},
        "plan": {"model": given.larger, "gradients": 4096, **larger},
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(out, indent=2) + "\n")
    print(table(planned, measured))
    seconds = ", ".join(f"{phase} {larger['seconds'][phase]:.0f} s" for phase in PHASES)
    print(f"\n{given.larger}, 4096 gradients: {larger['memory']['peak_bytes'] / 2**30:.1f} GiB, {seconds}")
    return out


if __name__ == "__main__":
    main()
