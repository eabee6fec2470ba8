"""For `test_crash.py`: whether what the runs of `crash_run.py` leave is whole and the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lightning_cap.callbacks.checkpoint_folders import read_folder
from lightning_cap.export.records import EXPORTS, ExportRecord
from lightning_cap.trainer.records import EVENTS, EventRecord
from lightning_cap.trainer.run_records import CYCLES, RUN, CycleRecord, RunRecord
from lightning_cap.utilities.bits import unpack_bits
from lightning_cap.utilities.records import read_records
from tests.support.crash_run import SCHEDULE, run_trial


class Whole:
    """Runs that are never killed, one of each kind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: dict[str, Path] = {}

    def __call__(self, ranks: int = 1, **order: Any) -> Path:
        kind = json.dumps([ranks, order], sort_keys=True)
        if kind not in self._runs:
            folder = self._folder / str(len(list(self._folder.iterdir())))
            assert run_trial(folder, ranks, **order) == [0] * ranks, log(folder)
            self._runs[kind] = folder
        return self._runs[kind]

    def counts(self, rank: int = 0, **order: Any) -> dict[str, int]:
        """How many moments there are of each phase."""
        counts: dict[str, int] = json.loads((self(**order) / f"counts-{rank}.json").read_text())
        return counts


def log(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log-*.txt")))


def masked(state: dict[str, Any], entry: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Where a callback's masks in a checkpoint say that a weight is pruned."""
    shapes = {name: mask["shape"] for name, mask in entry["masks"].items()}
    return {
        name: ~unpack_bits(entry["masks"][name]["bits"], state["state_dict"][name].numel()).view(shape)
        for name, shape in shapes.items()
    }


def callback_states(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Of the pruning callbacks."""
    return [entry for key, entry in state["callbacks"].items() if "CAPPruningCallback" in key]


def read(path: Path) -> Any:
    return read_folder(path) if path.is_dir() else torch.load(path, weights_only=True)


def check_checkpoint(path: Path, schedule: dict[int, float] = SCHEDULE) -> None:
    """It loads, and every event in it is whole: masks, weights and the list of events done tell the same."""
    state = read(path)
    entry, *others = callback_states(state)
    if others:  # of units, and of weights
        for one in (entry, *others):
            assert not any(state["state_dict"][name][where].any() for name, where in masked(state, one).items()), path
            assert one["collection_index"] == len(one["done"]), path
        return
    pruned = masked(state, entry)
    for name, where in pruned.items():
        assert torch.equal(state["state_dict"][name] == 0, where), (path, name)
    size = sum(where.numel() for where in pruned.values())
    done = entry["done"]
    assert done == list(schedule)[: len(done)], path
    assert entry["collection_index"] == len(done), path
    zeros = int(schedule[done[-1]] * size + 0.5) if done else 0
    assert sum(int(where.sum()) for where in pruned.values()) == zeros, path


def check_files(folder: Path, schedule: dict[int, float] = SCHEDULE) -> None:
    """Whatever a user or Lightning may load is complete; only hidden temporary files may be torn."""
    for path in folder.rglob("*"):
        if path.suffix == ".ckpt" and not path.name.startswith("."):
            check_checkpoint(path, schedule)
        if path.is_dir() or path.suffix in (".txt", ".pt", ".ckpt") or path.name.startswith("counts-"):
            continue  # this test's own, and files of such folders
        if path.parent.suffix == ".ckpt":
            assert path.name == ".metadata" or path.suffix == ".distcp", path
        elif path.suffix == ".safetensors":
            plain(path)
        elif path.suffix == ".jsonl":
            assert path.read_bytes()[-1:] in (b"\n", b"")  # whole lines, or none yet
            if path.name == EXPORTS:
                names = [record.path for record in read_records(path, ExportRecord)]
                assert len(set(names)) == len(names)
                assert all((path.parent / name).is_file() for name in names)
            elif path.name == RUN:
                assert read_records(path, RunRecord)
            elif path.name == CYCLES:
                lines = read_records(path, CycleRecord)
                assert all(Path(line.checkpoint).exists() for line in lines if line.checkpoint)
            else:
                records = read_records(path, EventRecord)
                epochs = [record.epoch for record in records if record.saving is None]
                if len(epochs) == len(records):  # no units
                    assert epochs == sorted(schedule)[: len(epochs)]
        else:
            above = [folder.name for folder in path.parents]
            assert any(name.startswith(".") and name.endswith(".tmp") for name in above), f"{path.name} is visible"


def same(a: Any, b: Any, where: str = "") -> None:
    """Equal bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b or (a != a and b != b), where


def without_folder(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {k: without_folder(v, folder) for k, v in value.items() if not str(k).startswith("ModelCheckpoint")}
    if isinstance(value, (list, tuple)):
        return [without_folder(v, folder) for v in value]
    return value.replace(str(folder), "") if isinstance(value, str) else value


def load(path: Path, folder: Path) -> Any:
    return without_folder(read(path), folder)


def plain(path: Path) -> tuple[Any, Any]:
    """Tensors and metadata; the order in which safetensors writes the latter is not fixed."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a dict


def events(folder: Path) -> list[EventRecord]:
    return [
        replace(record, seconds={}, measured_bytes=None)
        for record in read_records(folder / "pruned" / EVENTS, EventRecord)
    ]


def cycles(folder: Path) -> list[Any]:
    """Those of units and those of weights, each in order: which of the two wrote last is no matter."""
    lines = read_records(folder / "pruned" / CYCLES, CycleRecord)
    ordered = sorted(lines, key=lambda line: line.saving is None)
    return without_folder([line.to_json() for line in ordered], folder)  # type: ignore[no-any-return]


def exports(folder: Path) -> list[ExportRecord]:
    return read_records(folder / "pruned" / EXPORTS, ExportRecord)


def check_same_end(expected: Path, folder: Path, ranks: int = 1) -> None:
    """Weights, masks, optimizer, table, events and every checkpoint that stays."""
    check_files(folder)
    for rank in range(ranks):
        ends = [load(f / f"end-{rank}.pt", f) for f in (expected, folder)]
        batches = [end.pop("batches") for end in ends]
        same(*ends)
        assert batches[0][len(batches[0]) - len(batches[1]) :] == batches[1]  # fewer if little was left to train
    assert events(expected) == events(folder)
    assert exports(expected) == exports(folder)
    assert cycles(expected) == cycles(folder)
    assert read_records(folder / "pruned" / RUN, RunRecord)[-1].state == "finished"
    for path in [expected / "last.ckpt", *(expected / "pruned").glob("*.ckpt")]:
        same(load(path, expected), load(folder / path.relative_to(expected), folder), path.name)
    for path in (expected / "pruned").glob("*.safetensors"):
        same(plain(path), plain(folder / "pruned" / path.name), path.name)
