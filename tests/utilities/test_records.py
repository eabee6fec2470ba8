from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lightning_cap.callbacks.cycle import with_files
from lightning_cap.callbacks.run_files import RunFiles
from lightning_cap.comparison.records import ComparisonRecord, GridPoint, SurfaceRecord
from lightning_cap.errors import DataError
from lightning_cap.export.records import ExportRecord
from lightning_cap.trainer.records import EventRecord
from lightning_cap.trainer.run_records import CycleRecord
from lightning_cap.utilities.records import (
    Plain,
    Record,
    append_record,
    known_records,
    read_record,
    read_records,
    write_records,
)


@dataclass(frozen=True)
class Part:
    name: str
    value: Plain


@dataclass(frozen=True)
class Sample(Record):
    kind: ClassVar[str] = "sample"
    version: ClassVar[int] = 3

    count: int
    share: float
    flag: bool = False
    known: float | None = None
    values: Mapping[str, float | None] = field(default_factory=dict)
    line: tuple[float, ...] = ()
    part: Part | None = None


GIVEN = {"record": "sample", "version": 3, "count": 1, "share": 0.5, "flag": False, "known": None, "values": {}, "line": [],
         "part": None}  # fmt: skip


def test_a_line_says_what_it_is_and_comes_back(tmp_path: Path) -> None:
    sample = Sample(2, 0.1, True, 3.0, {"a": 1.5, "b": None}, (1.0, 2.5), Part("damp", "auto"))
    write_records(tmp_path / "new" / "r.jsonl", [sample, Sample(1, 0.5)])
    first, second = (tmp_path / "new" / "r.jsonl").read_text().splitlines()
    assert json.loads(first) == {
        "record": "sample", "version": 3, "count": 2, "share": 0.1, "flag": True, "known": 3.0,
        "values": {"a": 1.5, "b": None}, "line": [1.0, 2.5], "part": {"name": "damp", "value": "auto"},
    }  # fmt: skip
    assert json.loads(second)["part"] is None
    assert read_records(tmp_path / "new" / "r.jsonl", Sample) == [sample, Sample(1, 0.5)]


def test_numbers_that_are_not_finite_survive_in_lines_of_plain_json(tmp_path: Path) -> None:
    sample = Sample(1, math.inf, known=-math.inf, values={"a": math.nan, "b": None}, part=Part("x", math.inf))
    write_records(tmp_path / "r.jsonl", [sample])

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    line = json.loads((tmp_path / "r.jsonl").read_text(), parse_constant=refuse)
    assert (line["share"], line["known"], line["values"]) == ("Infinity", "-Infinity", {"a": "NaN", "b": None})
    (again,) = read_records(tmp_path / "r.jsonl", Sample)
    assert math.isnan(again.values["a"] or 0.0)
    assert replace(again, values={}) == replace(sample, values={})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5", r"5 is not a record\. .*'sample'.*remove that line"),
        ("null", r"None is not a record\."),
        ('"text"', r"'text' is not a record\."),
        ("[1]", r"\[1\] is not a record\."),
        ("{}", r"\{\} is not a record\."),
        ("{", r"\{ is not JSON: remove that line"),
        ("\x00\x00", "is not JSON"),
        ("[" * 100_000, r"\[\[.*\.\.\. is not JSON"),
        ({**GIVEN, "record": "event"}, "a record of kind 'event', .*'sample'"),
        ({**GIVEN, "record": None}, "a record of kind None"),
        ({**GIVEN, "version": 4}, "version 4 .* version 3: it is of a newer lightning-cap: install"),
        ({**GIVEN, "version": 2}, "version 2 .* version 3: remove that line"),
        ({**GIVEN, "version": "3"}, "version '3' "),
        ({**GIVEN, "version": True}, "version True "),
        ({key: GIVEN[key] for key in GIVEN if key != "version"}, "version None "),
        ({key: GIVEN[key] for key in GIVEN if key != "share"}, "'sample' with no field share: remove"),
        ({key: GIVEN[key] for key in GIVEN if key != "flag"}, "no field flag"),
        ({**GIVEN, "more": 1}, "a field more, which it does not have"),
        ({**GIVEN, "count": 1.5}, "count=1.5, which is not of the type int"),
        ({**GIVEN, "count": True}, "count=True"),
        ({**GIVEN, "share": None}, "share=None, which is not of the type float"),
        ({**GIVEN, "share": "nan"}, "share='nan'"),
        ({**GIVEN, "flag": 1}, "flag=1, which is not of the type bool"),
        ({**GIVEN, "known": "no"}, r"known='no', which is not of the type float \| None"),
        ({**GIVEN, "values": [1]}, r"values=\[1\], which is not of the type .*Mapping"),
        ({**GIVEN, "values": {"a": {}}}, r"values\.a=\{\}"),
        ({**GIVEN, "line": 1.0}, "line=1.0, which is not of the type tuple"),
        ({**GIVEN, "line": {"0": 1.0}}, "line="),
        ({**GIVEN, "line": [1.0, "x"]}, r"line\[1\]='x'"),
        ({**GIVEN, "part": {"name": 1, "value": 2}}, "part="),
        ({**GIVEN, "part": 5}, "part=5"),
    ],
)
def test_other_lines_are_one_error_that_names_file_and_line(tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "r.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{json.dumps(GIVEN)}\n\n{text}\n{json.dumps(GIVEN)}\n")
    before = path.read_bytes()
    with pytest.raises(DataError, match=rf"^{path}, line 3: .*{message}"):
        read_records(path, Sample)
    with pytest.raises(DataError, match="line 3"):
        append_record(path, Sample(1, 0.5), lambda old: True)
    assert path.read_bytes() == before


def test_a_torn_last_line_is_left_out_with_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "r.jsonl"
    for torn in (b'{"record": "sam', b"\x00\x00\x00", "\N{SNOWMAN}".encode()[:1]):
        path.write_bytes(json.dumps(GIVEN).encode() + b"\n" + torn)
        caplog.clear()
        assert read_records(path, Sample) == [Sample(1, 0.5)]
        assert f"{path}: the last line is torn" in caplog.text
    append_record(path, Sample(2, 0.5), lambda old: False)
    caplog.clear()
    assert read_records(path, Sample) == [Sample(1, 0.5), Sample(2, 0.5)]
    assert caplog.text == ""
    path.write_text(json.dumps(GIVEN))  # whole, without a line feed
    assert read_records(path, Sample) == [Sample(1, 0.5)]
    path.write_text("5")
    with pytest.raises(DataError, match="line 1: 5 is not a record"):
        read_records(path, Sample)


def test_files_that_are_not_there_or_hold_another_number_of_records(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    assert known_records(path, Sample) == []
    for wrong in (path, tmp_path):
        with pytest.raises(DataError, match=f"{wrong}: it cannot be read .* kind 'sample'"):
            read_records(wrong, Sample)
    for count in (0, 2):
        write_records(path, [Sample(1, 0.5)] * count)
        with pytest.raises(DataError, match=f"holds {count} records"):
            read_record(path, Sample)
    write_records(path, [Sample(1, 0.5)])
    assert read_record(path, Sample) == Sample(1, 0.5)


def test_a_torn_file_of_one_record_is_one_error_and_nothing_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "r.json"
    for torn in ('{"record": "sam', json.dumps(GIVEN) + '\n{"rec'):
        path.write_text(torn)
        with pytest.raises(DataError, match=rf"^{path}: it is torn, .*: move the file away\.$"):
            read_record(path, Sample)
    assert caplog.text == ""


def test_a_new_record_takes_the_place_of_those_that_it_supersedes(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for count, share in ((0, 0.1), (10, 0.1), (20, 0.1), (10, 0.2)):
        append_record(path, Sample(count, share), lambda old, count=count: old.count >= count)  # type: ignore[misc]
    assert read_records(path, Sample) == [Sample(0, 0.1), Sample(10, 0.2)]


def test_what_is_no_plain_value_is_not_written(tmp_path: Path) -> None:
    write_records(tmp_path / "r.jsonl", [Sample(1, 0.5)])
    with pytest.raises(TypeError):
        write_records(tmp_path / "r.jsonl", [Sample(1, 0.5, values={"a": object()})])  # type: ignore[dict-item]
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]
    assert read_records(tmp_path / "r.jsonl", Sample) == [Sample(1, 0.5)]


EVENT = EventRecord(
    epoch=3, goal=0.5, sparsity=0.5, predicted_loss=0.1, unit="gradients", samples=48, skipped=1, grown_back=0,
    peak_bytes=100, measured_bytes=90, seconds={"plan": 0.1, "solve": 2}, stats={"passes": 1}, before={"val_acc": 0.9},
    after={"val_acc": math.inf}, sparsities={"net.4.weight": 0.5},
)  # fmt: skip
RECORDS: list[Record] = [
    EVENT,
    ExportRecord(format="safetensors", path="a.safetensors", goal=0.5, sparsity=0.5, architecture="", bytes=10),
    with_files(CycleRecord(0.5, 3, None, 0.5), RunFiles(Path("folder"))),
    SurfaceRecord(pruners=("a", "b"), sparsity=0.5, axis=(0.0,), loss=((1.0,),), corners={"unpruned": 1.0}, of=("f",)),
    ComparisonRecord(
        pruner="CAP", label="CAP damp=1", grid=GridPoint("damp", 1), seed=0, goal=0.5, sparsity=0.5, sparsities={"w": 0.5},
        metrics={"val_acc": 0.5}, predicted_loss=0.1, loss_increase={"validation": 0.1, "calibration": None},
        seconds={"solve": 1.0}, settings="CAP()", parameters={"damp": 1, "backend": "numba", "flag": True, "limit": None},
        stats={"passes": 1}, masks="m", weights="", solution="s", fingerprint="f",
    ),
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind)
def test_every_kind_of_record_comes_back_as_it_was(tmp_path: Path, record: Record) -> None:
    write_records(tmp_path / "r.jsonl", [record])
    again = read_record(tmp_path / "r.jsonl", type(record))
    assert again == record
    assert again.to_json() == record.to_json()


def test_kinds_are_told_apart() -> None:
    assert len({record.kind for record in RECORDS}) == len(RECORDS)


def test_loggers_get_an_event_under_the_names_that_they_have_always_had() -> None:
    assert EVENT.logged() == {
        "cap/sparsity": 0.5, "cap/predicted_loss": 0.1, "cap/gradients": 48.0, "cap/gradients_skipped": 1.0,
        "cap/grown_back": 0.0, "cap/peak_bytes": 100.0, "cap/measured_bytes": 90.0,
        "cap/passes": 1.0, "cap/seconds/plan": 0.1, "cap/seconds/solve": 2.0,
        "cap/before/val_acc": 0.9, "cap/after/val_acc": math.inf, "cap/layer_sparsity/net.4.weight": 0.5,
    }  # fmt: skip
    assert {"cap/inputs", "cap/inputs_skipped"} <= replace(EVENT, unit="inputs").logged().keys()


def test_a_full_disk_leaves_the_old_lines(tmp_path: Path, full_disk: Callable[[], None]) -> None:
    path = tmp_path / "a.jsonl"
    append_record(path, CycleRecord(0.5, 0, None, 0.5), lambda old: False)
    before = path.read_bytes()
    full_disk()
    with pytest.raises(OSError, match="No space left"):
        append_record(path, CycleRecord(0.75, 1, None, 0.75), lambda old: False)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
