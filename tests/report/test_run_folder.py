"""Finding and reading what runs and comparisons leave behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_cap.comparison.records import SurfaceRecord
from lightning_cap.errors import DataError
from lightning_cap.report.run_folder import Comparison, Run, read_folder
from lightning_cap.trainer.records import EVENTS, Saving
from lightning_cap.trainer.run_records import CYCLES, RUN, CycleRecord
from lightning_cap.utilities.records import write_records
from tests.support.report_runs import (
    GOALS,
    add_export,
    add_finetuned,
    comparison_records,
    cycle_records,
    event_record,
    run_record,
    write_comparison,
    write_run,
)  # fmt: skip


def one_run(folder: Path) -> Run:
    (found,) = read_folder(folder)
    assert isinstance(found, Run)
    return found


def test_a_run_is_found_from_its_folder_and_from_its_checkpoints(tmp_path: Path) -> None:
    write_run(tmp_path)
    add_finetuned(tmp_path)
    add_export(tmp_path)
    run = one_run(tmp_path)
    assert run == one_run(tmp_path / "checkpoints")
    assert run.start is not None
    assert run.start.model == "small_vit"
    assert [event.goal for event in run.events] == list(GOALS.values())
    assert [cycle.goal for cycle in run.cycles] == [0.0, 0.5, 0.75]
    assert [record.goal for record in run.finetuned] == [0.5, 0.75]
    assert [path.name for path, _ in run.exports] == ["sparsity=0.75.onnx"]
    assert run.metrics is not None
    assert list(run.settings) == [tmp_path / "hparams.yaml"]
    assert run.notes == []


def test_a_run_before_its_first_event_is_found(tmp_path: Path) -> None:
    (tmp_path / EVENTS).touch()
    write_records(tmp_path / RUN, [run_record(state="running", ended="")])
    run = one_run(tmp_path)
    assert run.events == []
    assert run.metrics is None


def test_several_runs_in_a_folder_are_told_apart_by_their_suffixes(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_run(tmp_path, suffix="-v1", events=[event_record(2, 0.5)])
    write_run(tmp_path, suffix="-v10")
    first, second, third = read_folder(tmp_path)
    assert isinstance(first, Run)
    assert isinstance(second, Run)
    assert isinstance(third, Run)
    assert [run.suffix for run in (first, second, third)] == ["", "-v1", "-v10"]
    assert [len(run.events) for run in (first, second, third)] == [2, 1, 2]
    assert first.metrics is None
    assert "metrics.csv is left out" in first.notes[0]
    assert third.metrics is not None


def test_two_callbacks_of_a_run_are_told_apart_by_what_their_goals_count(tmp_path: Path) -> None:
    saving = Saving("flops", 0.25, 1e6, "FLOPs")
    events = [event_record(2, 0.25, saving=saving), event_record(4, 0.5)]
    write_run(tmp_path, events=events)
    write_records(tmp_path / "checkpoints" / RUN, [run_record(counted="flops"), run_record()])
    flops, zeros = read_folder(tmp_path)
    assert isinstance(flops, Run)
    assert isinstance(zeros, Run)
    assert (flops.counted, zeros.counted) == ("flops", "sparsity")
    assert (len(flops.events), len(zeros.events)) == (1, 1)
    assert flops.cycles == []


def test_a_comparison_is_found_with_its_surface(tmp_path: Path) -> None:
    records = comparison_records()
    write_comparison(tmp_path, records)
    of = (records[1].fingerprint, records[2].fingerprint)
    surface = SurfaceRecord(
        pruners=("A", "B"), sparsity=0.5, axis=(0.0, 1.0), loss=((1.0, 2.0), (2.0, 3.0)), corners={}, of=of
    )
    write_records(tmp_path / "surface.json", [surface])
    assert read_folder(tmp_path) == [Comparison(tmp_path, records, surface, [])]
    write_records(tmp_path / "surface.json", [replace(surface, of=("other",))])
    assert read_folder(tmp_path) == [
        Comparison(tmp_path, records, None, ["surface.json is of other results, and is left out."])
    ]


def test_a_torn_last_line_is_left_out_and_told(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "checkpoints" / EVENTS
    path.write_text(path.read_text()[:-20])
    run = one_run(tmp_path)
    assert len(run.events) == 1
    assert run.notes == ["events.jsonl: the last line is torn, as after a kill or on a full disk; it is left out."]


def test_files_are_found_where_the_run_was_moved_to(tmp_path: Path) -> None:
    write_run(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    run = one_run(tmp_path / "after")
    assert run.file(run.cycles[1].checkpoint) == tmp_path / "after/checkpoints/sparsity=0.50.ckpt"
    tuned = tmp_path / "after/finetuned/sparsity=0.50/sparsity=0.50.ckpt"
    tuned.parent.mkdir(parents=True)
    tuned.touch()
    assert run.file("runs/before/finetuned/sparsity=0.50/sparsity=0.50.ckpt") == tuned
    assert run.file("gone.ckpt") == Path("gone.ckpt")


def test_cycles_come_with_their_ends_before_their_best_epochs(tmp_path: Path) -> None:
    write_run(tmp_path)
    best = [CycleRecord(0.5, 3, 0.99, 0.5, best=True), CycleRecord(0.75, 6, 0.99, 0.75, best=True)]
    write_records(tmp_path / "checkpoints" / CYCLES, [*best, *cycle_records()])
    found = [(cycle.goal, cycle.best) for cycle in one_run(tmp_path).cycles]
    assert found == [(0.0, False), (0.5, False), (0.5, True), (0.75, False), (0.75, True)]


def test_records_of_another_version_are_refused_by_file_and_line(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "checkpoints" / "cycles.jsonl"
    newer = {**cycle_records()[0].to_json(), "version": 99}
    path.write_text(path.read_text() + json.dumps(newer) + "\n")
    with pytest.raises(DataError, match=r"cycles.jsonl, line 4: version 99 .* newer lightning-cap"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "it is empty: there is no run.jsonl, events.jsonl or results.jsonl"),
        ({"a.txt": "x"}, "it is no folder of a run"),
        ({"events.jsonl": ""}, "events.jsonl holds no record yet"),
        ({"results.jsonl": ""}, "results.jsonl holds no record yet"),
        ({"checkpoints/events-v3.jsonl": '{"rec'}, "events-v3.jsonl holds no record yet"),
        ({"version_0/checkpoints/run.jsonl": "", "version_1/metrics.csv": ""}, "those of version_0 in it"),
        ({"a/version_0/events.jsonl": "", "b/results.jsonl": ""}, "those of a/version_0, b in it"),
        ({"metrics.csv": "epoch,step\n"}, "it has metrics.csv, but no run.jsonl or events.jsonl"),
        ({"events.jsonl": "text\n"}, "events.jsonl, line 1: text is not JSON"),
        ({"events.jsonl": '{"a": 1}\n'}, "events.jsonl, line 1: {'a': 1} is not a record"),
        ({"surface.json": "{", "results.jsonl": ""}, "surface.json: it is torn"),
    ],
)
def test_folders_of_something_else_are_refused(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        read_folder(tmp_path)
    assert words in str(error.value)


def test_missing_folders_and_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        read_folder(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="it is a file"):
        read_folder(tmp_path / "file")
