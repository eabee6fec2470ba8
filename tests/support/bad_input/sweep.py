"""Bad input to the fine-tuning of a run's checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_cap.callbacks.fixed_masks import FixedMasks
from lightning_cap.errors import CAPError, ConfigError, DataError
from lightning_cap.report.sweep import print_sweep
from lightning_cap.sweep import Finetuning, SweepFolder, find_checkpoints
from lightning_cap.trainer.run_records import FinetunedRecord
from tests.support.bad_input.table import Command, Line, wrong
from tests.support.sweeping import checkpoint, state

RECORD = FinetunedRecord(
    goal=0.5, sparsity=0.5, flops_saved=0.4, metric="val/acc", before=0.7, after=0.8, epochs=1, source="a"
)
CONFIG = (
    "model: {class_path: lightning_cap.VisionClassifier, init_args: {model: resnet10t}}\ntrainer: {logger: false}\n"
)


def finding(name: str, word: str, prepare: Callable[[Path], Any], error: type[CAPError] = DataError) -> Line:
    return Line(f"find_checkpoints: {name}", lambda folder: find_checkpoints(folder / "run"), error, (word,), prepare)


def torn(folder: Path) -> None:
    path = checkpoint(folder / "run/checkpoints")
    path.write_bytes(path.read_bytes()[:400])


def foreign(folder: Path) -> None:
    path = checkpoint(folder / "run", "epoch=0-step=1.ckpt")
    path.with_name("val_acc=0.95.ckpt").write_bytes(path.read_bytes())


def newer(folder: Path) -> None:
    checkpoint(folder)
    (folder / "finetuned.jsonl").write_text('{"record": "finetuned", "version": 99}\n')


def read_done(folder: Path) -> None:
    place, found = find_checkpoints(folder)
    place.record(found[0])


def command(name: str, args: list[str], *words: str, **files: str | bytes) -> Command:
    given = {file.replace("__", "/"): content for file, content in files.items()}
    return Command(f"finetune-sweep: {name}", ["finetune-sweep", *args], words, {"c.yaml": CONFIG, **given})


LINES: list[Line | Command] = [
    *[
        Line(f"find_checkpoints({value!r})", lambda _, v=value: find_checkpoints(v), ConfigError, (f"RUN_DIR={value!r}",))  # type: ignore[misc]
        for value in (None, 3, True, "", [Path("runs")], {"a": 1})
    ],
    finding("a missing folder", "there is no such folder", lambda folder: None),
    finding("a file", "this is a file", lambda folder: (folder / "run").touch()),
    finding("an empty folder", "it is empty", lambda folder: (folder / "run").mkdir()),
    finding("a foreign folder", "it has no checkpoints of a pruning run", foreign),
    finding("a torn checkpoint", "checkpoint=", torn),
    finding("a checkpoint of a newer version", "version 99", lambda folder: checkpoint(folder / "run", version=99)),
    finding("a checkpoint without history", "'history'", lambda folder: checkpoint(folder / "run", history=3)),
    Line("SweepFolder.record of a newer version", read_done, DataError, ("newer lightning-cap",), newer),
    *wrong(FixedMasks, "state", None, 3, "masks", [1], error=ConfigError),
    Line("FixedMasks of nothing", lambda _: FixedMasks({}), DataError, ("version",)),
    Line("FixedMasks before pruning", lambda _: FixedMasks(state(masks=None)), ConfigError, ("nothing was pruned yet",)),
    *wrong(Finetuning, "checkpoint", None, "a.ckpt", 3, given={"folder": SweepFolder(Path(), Path()), "masks": []}),
    *wrong(print_sweep, "records", None, 3, "all", RECORD, given={"folder": "a"}),
    Line("print_sweep of others", lambda _: print_sweep([3], "a"), ConfigError, ("records=3",)),  # type: ignore[list-item]
    *wrong(print_sweep, "folder", None, 3, "", given={"records": [RECORD]}),
    *wrong(print_sweep, "console", 3, "stdout", given={"records": [RECORD], "folder": "a"}),
    command("nothing", [], "RUN_DIR"),
    command("options first", ["--config", "c.yaml", "{folder}"], "RUN_DIR: it comes first"),
    command("a missing folder", ["runs/none", "--config", "c.yaml"], "RUN_DIR='runs/none': there is no such folder"),
    command("a file", ["c.yaml", "--config", "c.yaml"], "this is a file"),
    command("no checkpoints", [".", "--config", "c.yaml"], "it has no checkpoints of a pruning run"),
    command("half-written", [".", "--config", "c.yaml"], "sparsity=0.50.ckpt", **{"sparsity=0.50.ckpt": b"PK\x03\x04 torn"}),
]  # fmt: skip
