"""Bad input to ``write_report`` and ``lightning-cap report``."""

from __future__ import annotations

import json

from lightning_cap.errors import ConfigError, DataError
from lightning_cap.report import write_report
from tests.support.bad_input.table import Command, Line, wrong
from tests.support.report_runs import event_record, run_record

_RUN = json.dumps(run_record().to_json()) + "\n"
_EVENT = json.dumps(event_record(2, 0.5).to_json()) + "\n"
_NEWER = json.dumps({**event_record(4, 0.75).to_json(), "version": 99}) + "\n"
_EXAMPLE = "runs/digits_gradual/version_0"


def command(name: str, args: list[str], *words: str, files: dict[str, str | bytes] | None = None) -> Command:
    return Command(f"report {name}", ["report", *args], words, files or {})


LINES = [
    *wrong(write_report, "folders", None, 3, True, float("nan"), {"a": 1}, {"a"}, object, words=("give a list",)),
    *wrong(write_report, "folders", [], words=("give at least one",)),
    *wrong(write_report, "output", 3, True, [], "", {"a": 1}, object, given={"folders": "run"}, words=("give a string",)),
    Line("write_report(folders=[3])", lambda _: write_report([3]), ConfigError, ("folders=3", _EXAMPLE)),  # type: ignore[list-item]
    Line("write_report(folders=['', ...])", lambda _: write_report(["", "a"]), ConfigError, ("folders=''", _EXAMPLE)),
    Line("write_report(folders='missing')", lambda _: write_report("missing"), DataError, ("'missing'", "no such folder")),
    command("without a folder", [], "required: run_dir", "lightning-cap report runs/digits_gradual/version_0"),
    command("of nothing", ["missing"], "RUN_DIR='missing'", "there is no such folder"),
    command("of a file", ["run/run.jsonl"], "it is a file", files={"run/run.jsonl": _RUN}),
    command("of a foreign folder", ["run"], "RUN_DIR='run'", "it is no folder of a run", files={"run/notes.txt": "x"}),
    command("of a folder of runs", ["runs"], "those of version_0 in it", files={"runs/version_0/checkpoints/run.jsonl": _RUN}),
    command("of a half-written run", ["run"], "events.jsonl holds no record yet", files={"run/events.jsonl": '{"record": "eve'}),
    command("of a newer version", ["run"], "events.jsonl, line 2: version 99", "newer lightning-cap",
            files={"run/run.jsonl": _RUN, "run/events.jsonl": _EVENT + _NEWER}),
    command("of other records", ["run"], "cycles.jsonl, line 1: a record of kind 'event'", files={"run/cycles.jsonl": _EVENT}),
    command("of binary records", ["run"], "run.jsonl, line 1:", "not JSON", files={"run/run.jsonl": b"\xff\xfe\n\x00"}),
    command("of a foreign metrics.csv", ["run"], "metrics.csv, line 1:", "'step'",
            files={"run/run.jsonl": _RUN, "run/metrics.csv": "a,b\n1,2\n"}),
    command("with one of two missing", ["run", "missing"], "RUN_DIR='missing'", files={"run/run.jsonl": _RUN}),
    command("of the same twice", ["run", "./run"], "RUN_DIR=['run', 'run']", "given twice", files={"run/run.jsonl": _RUN}),
    command("into a folder", ["run", "--output", "run"], "--output='run'", "this is a folder", files={"run/run.jsonl": _RUN}),
    command("into a file's folder", ["run", "--output", "a/b.html"], "--output='a/b.html'", "cannot be written",
            files={"run/run.jsonl": _RUN, "a": "x"}),
    command("with a wrong option", ["run", "--outptu", "x"], "--outptu", "did you mean '--output'?"),
]  # fmt: skip
