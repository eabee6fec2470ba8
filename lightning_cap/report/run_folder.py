"""Finds the records of a run or a comparison in a folder, and reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from lightning_cap.comparison.records import RESULTS, SURFACE, ComparisonRecord, SurfaceRecord
from lightning_cap.errors import DataError
from lightning_cap.export.records import BENCHMARKS, EXPORTS, BenchmarkRecord, ExportRecord
from lightning_cap.report.csv_metrics import METRICS, Metrics, read_metrics
from lightning_cap.trainer.records import EVENTS, EventRecord
from lightning_cap.trainer.run_records import CYCLES, FINETUNED, RUN, CycleRecord, FinetunedRecord, RunRecord
from lightning_cap.utilities.arguments import shown
from lightning_cap.utilities.records import Record, read_record, read_up_to_tear

R = TypeVar("R", bound=Record)

CHECKPOINTS = "checkpoints"  # in the folder of a run
_SETTINGS = ("config.yaml", "hparams.yaml")
_OF_RUNS = (RUN, EVENTS, CYCLES, FINETUNED)
_SUFFIXED = re.compile(
    "|".join(rf"{re.escape(Path(name).stem)}(?P<s{i}>-v\d+)?\.jsonl" for i, name in enumerate(_OF_RUNS))
)
_EXAMPLE = "Give the folder of a run, such as runs/digits_gradual/version_0, or of a comparison."


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    Attributes:
        folder: That has its records.
        suffix: Of the names of its files, see `lightning_cap.callbacks.run_files.RunFiles`.
        counted: What its goals count.
        starts: Its records of starts, in their order.
        events: Of its events, by epoch.
        cycles: Of its cycles, the model before the first event first.
        finetuned: Of its fine-tuned checkpoints.
        exports: Of its files for other runtimes, with their paths.
        benchmarks: Of these.
        metrics: Of the CSV logger; None if there are none.
        settings: Texts of its configuration, by the file's path.
        notes: What could not be read.
    """

    folder: Path
    suffix: str
    counted: str
    starts: Sequence[RunRecord] = ()
    events: Sequence[EventRecord] = ()
    cycles: Sequence[CycleRecord] = ()
    finetuned: Sequence[FinetunedRecord] = ()
    exports: Sequence[tuple[Path, ExportRecord]] = ()
    benchmarks: Sequence[BenchmarkRecord] = ()
    metrics: Metrics | None = None
    settings: dict[Path, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def start(self) -> RunRecord | None:
        """The last one; None if there is none."""
        return self.starts[-1] if self.starts else None

    def file(self, path: str) -> Path:
        """A file that a record names, where it is now: by the longest end of its path that is in the folder of the run."""
        parts = Path(path).parts
        moved = [
            base / Path(*parts[-n:])
            for n in range(min(len(parts), 4), 0, -1)
            for base in (self.folder, self.folder.parent)
        ]
        return next((place for place in moved if place.exists()), Path(path))


@dataclass(frozen=True)
class Comparison:
    """What is known of a comparison: its folder, its records, its surface, and what could not be read."""

    folder: Path
    records: Sequence[ComparisonRecord]
    surface: SurfaceRecord | None = None
    notes: Sequence[str] = ()


def read_folder(folder: Path) -> list[Run | Comparison]:
    """The runs and the comparison in a folder.

    Args:
        folder: Of a run's logs, or its checkpoints, or a comparison.

    Raises:
        DataError: There is no such folder, it holds nothing of ours, or a file in it is something else than its name says.
    """
    try:
        if not folder.is_dir():
            what = "it is a file" if folder.exists() else "there is no such folder"
            raise DataError(f"RUN_DIR={shown(str(folder))}: {what}. {_EXAMPLE}")
        found: list[Run | Comparison] = [
            run for place in (folder, folder / CHECKPOINTS) if place.is_dir() for run in _runs(place)
        ]
        if (folder / RESULTS).exists():
            found += _comparison(folder)
        if not found:
            raise DataError(f"RUN_DIR={shown(str(folder))}: {_what_is_there(folder)}")
    except OSError as error:
        raise DataError(f"RUN_DIR={shown(str(folder))}: it cannot be read ({error.strerror}). {_EXAMPLE}") from error
    return found


def _what_is_there(folder: Path) -> str:
    """Why nothing was found."""
    empty = [path for path in _record_files(folder) + _record_files(folder / CHECKPOINTS) if path.is_file()]
    if empty or (folder / RESULTS).exists():
        name = empty[0].name if empty else RESULTS
        return f"{name} holds no record yet, as the run was stopped before its first. Start it again, or give another folder."
    inside = sorted(set(_deeper(folder)))
    if inside:
        several = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
        return f"it has no records itself, but those of {several} in it. Give one of these, or several."
    if (folder / METRICS).exists():
        return (
            f"it has {METRICS}, but no {RUN} or {EVENTS}. Give the folder that has the checkpoints of the run, which a resumed run "
            "goes on with."
        )
    names = f"{RUN}, {EVENTS} or {RESULTS}"
    return f"it is {'no folder of a run' if any(folder.iterdir()) else 'empty'}: there is no {names}. {_EXAMPLE}"


def _deeper(folder: Path) -> Iterable[str]:
    """Folders in this one that have records."""
    for below in ("*", "*/*"):
        for place in folder.glob(below):
            if place.is_dir() and (any(map(_record_files, (place, place / CHECKPOINTS))) or (place / RESULTS).exists()):
                yield str(place.relative_to(folder).as_posix().removesuffix(f"/{CHECKPOINTS}"))


def _record_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.jsonl")) if _SUFFIXED.fullmatch(path.name)]


def _runs(folder: Path) -> list[Run]:
    """The runs that have written into a folder: by the suffix of their files, and by what their goals count."""
    names = [_SUFFIXED.fullmatch(path.name) for path in _record_files(folder)]
    suffixes = sorted({match[match.lastindex or 0] if match.lastindex else "" for match in names if match}, key=_age)
    found = []
    for suffix in suffixes:
        found += _runs_of(folder, suffix, last=suffix == suffixes[-1], alone=len(suffixes) == 1)
    return found


def _age(suffix: str) -> int:
    return int(suffix.removeprefix("-v") or 0)


def _runs_of(folder: Path, suffix: str, last: bool, alone: bool) -> list[Run]:
    """Those of one suffix: one for each of what goals count."""
    notes: list[str] = []

    def read(name: str, kind: type[R]) -> list[R]:
        return _read(folder / f"{Path(name).stem}{suffix}.jsonl", kind, notes)

    starts, events, cycles = read(RUN, RunRecord), read(EVENTS, EventRecord), read(CYCLES, CycleRecord)
    finetuned = read(FINETUNED, FinetunedRecord)
    exports = [
        (place / record.path, record)
        for place in (folder, folder / "export")
        for record in _read(place / EXPORTS, ExportRecord, notes)
        if alone or _of_suffix(record.path, suffix)
    ]
    benchmarks = _read(folder / "export" / BENCHMARKS, BenchmarkRecord, notes)
    names = {path.name for path, _ in exports}
    metrics, settings = _logs(folder, notes) if last else (None, {})
    if not last:
        notes.append(f"{METRICS} is left out: another run has written to this folder since.")
    counts = [start.counted for start in starts] + [_counted(event) for event in events] + [_counted(c) for c in cycles]
    counted = dict.fromkeys(counts or ["sparsity"] * bool(finetuned))
    return [
        Run(
            folder,
            suffix,
            counts,
            [start for start in starts if start.counted == counts],
            sorted((event for event in events if _counted(event) == counts), key=lambda event: event.epoch),
            _in_order([cycle for cycle in cycles if _counted(cycle) == counts]),
            finetuned,
            exports,
            [record for record in benchmarks if record.model in names or record.model == record.dense],
            metrics,
            settings,
            notes,
        )
        for counts in counted
    ]


def _in_order(cycles: list[CycleRecord]) -> list[CycleRecord]:
    """The model before the first event, then the cycles; of each its end, then its best epoch."""
    last = {
        goal: max(cycle.epochs for cycle in cycles if cycle.goal == goal) for goal in {cycle.goal for cycle in cycles}
    }
    return sorted(cycles, key=lambda cycle: (cycle.goal > 0, last[cycle.goal], cycle.goal, cycle.best))


def _of_suffix(path: str, suffix: str) -> bool:
    """Whether a file is of the run with this suffix."""
    found = re.search(r"(-v\d+)(?=[-.])", path)
    return (found[1] if found else "") == suffix


def _counted(record: EventRecord | CycleRecord) -> str:
    return "sparsity" if record.saving is None else record.saving.cost


def _read(path: Path, kind: type[R], notes: list[str]) -> list[R]:
    """The records of a file, none if there is none."""
    if not path.exists():
        return []
    records, torn = read_up_to_tear(path, kind)
    if torn:
        notes.append(f"{path.name}: the last line is torn, as after a kill or on a full disk; it is left out.")
    return records


def _logs(folder: Path, notes: list[str]) -> tuple[Metrics | None, dict[Path, str]]:
    """What the CSV logger and Lightning's command have left: beside the records, or in the folder above."""
    places = (folder, folder.parent) if folder.name == CHECKPOINTS else (folder,)
    paths = [place / METRICS for place in places if (place / METRICS).is_file()]
    metrics = read_metrics(paths[0]) if paths else None
    if metrics is not None and metrics.torn:
        notes.append(f"{METRICS}: the last line is torn, as after a kill or while it is written; it is left out.")
    settings = {
        path: path.read_text(errors="replace")
        for place in places
        for name in _SETTINGS
        if (path := place / name).is_file()
    }
    return metrics, settings


def _comparison(folder: Path) -> list[Comparison]:
    """That of a folder; none if it has no records."""
    notes: list[str] = []
    records = _read(folder / RESULTS, ComparisonRecord, notes)
    path = folder / SURFACE
    surface = read_record(path, SurfaceRecord) if path.exists() else None
    if surface is not None and not {record.fingerprint for record in records}.issuperset(surface.of):
        notes.append(f"{SURFACE} is of other results, and is left out.")
        surface = None
    return [Comparison(folder, records, surface, notes)] if records else []
