"""A comparison that was stopped, killed or changed goes on with what it has."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_cap.comparison import runner
from lightning_cap.errors import DataError
from lightning_cap.export.records import ExportRecord
from lightning_cap.pruners import Magnitude
from lightning_cap.utilities.records import read_records
from tests.support.comparing import assert_close, collections, comparable, paths, results, run, toy
from tests.support.processes import FORKED
from tests.support.toy import cap


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = comparable(run(tmp_path / "whole", max_rows_memory=1))
    evaluate, left = runner.Measure.metrics, [5]

    def failing(self: Any, solution: str) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("killed")
        return evaluate(self, solution)

    with monkeypatch.context() as patch:
        patch.setattr(runner.Measure, "metrics", failing)
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path / "part", max_rows_memory=1)
    assert len(results(tmp_path / "part")) == 5
    assert list(tmp_path.glob("part/.work/*/*.bin"))  # the gradient rows wait for the next run
    counts, solved = collections(monkeypatch), paths(monkeypatch)
    assert comparable(run(tmp_path / "part", max_rows_memory=1)) == whole
    assert counts == []
    assert solved == ["few/0"]
    assert not (tmp_path / "part/.work").exists()


def test_only_what_changed_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path)
    solved = paths(monkeypatch)
    assert run(tmp_path) == first
    assert solved == []
    changed = run(tmp_path, {"CAP": cap(), "few": cap(num_gradients=24), "GM": Magnitude()}, [0.5, 0.75, 0.9])
    assert solved == ["GM/0", "CAP/0", "few/0"]  # 0.9 is new for all
    old = {record.fingerprint for record in first}
    assert [(record.pruner, record.goal) for record in changed if record.fingerprint not in old] == [
        ("CAP", 0.9), ("few", 0.5), ("few", 0.75), ("few", 0.9), ("GM", 0.9),
    ]  # fmt: skip
    solved.clear()
    (tmp_path / changed[1].masks).unlink()
    run(tmp_path, {"CAP": cap(), "few": cap(num_gradients=24), "GM": Magnitude()}, [0.5, 0.75, 0.9])
    assert solved == ["CAP/0"]
    solved.clear()
    other = toy()
    with torch.no_grad():
        other.net[6].bias.add_(1e-3)
    run(tmp_path, module=other)
    assert len(solved) == 3  # another model: nothing can be kept
    (tmp_path / "results.jsonl").write_text('{"record": "compar')
    solved.clear()
    run(tmp_path)
    assert len(solved) == 3


MANY = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]


def compare_for_long(folder: Path) -> None:
    run(folder, sparsities=MANY, seeds=range(40))


@pytest.mark.xdist_group("processes")
def test_a_kill_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = FORKED.Process(target=compare_for_long, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 120
    while not ((tmp_path / "results.jsonl").is_file() and len(results(tmp_path)) > 8):
        assert process.is_alive(), "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()
    kept = results(tmp_path)
    solved = paths(monkeypatch)
    records = run(tmp_path, sparsities=MANY, seeds=(0,))
    mine = [record for record in kept if record.seed in (None, 0)]
    assert [record for record in records if record in mine] == mine  # kept to the last digit
    assert len(mine) > 1
    assert len(solved) < 3
    assert_close(records, run(None, sparsities=MANY))


@pytest.mark.parametrize("text", ["5\n", "null\n", "[{\n", '{"record": "event", "version": 1}\n'])
@pytest.mark.parametrize("name", ["results.jsonl", "exports.jsonl"])
def test_foreign_files_are_refused_before_anything_runs(
    tmp_path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = paths(monkeypatch)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}, line 1: "):
        run(tmp_path, Magnitude())
    assert solved == []
    assert (tmp_path / name).read_text() == text


def test_weights_are_exported_with_a_record(tmp_path: Path) -> None:
    records = run(tmp_path, {"GM": Magnitude()}, save_weights=True)
    exports = read_records(tmp_path / "GM" / "exports.jsonl", ExportRecord)
    assert [f"GM/{export.path}" for export in exports] == [record.weights for record in records[1:]]
    assert [(export.goal, export.sparsity, export.format) for export in exports] == [
        (0.5, 0.5, "safetensors"), (0.75, 0.75, "safetensors"),
    ]  # fmt: skip
    (tmp_path / records[1].masks).unlink()
    run(tmp_path, {"GM": Magnitude()}, save_weights=True)  # writes the one again: a record per file
    again = read_records(tmp_path / "GM" / "exports.jsonl", ExportRecord)
    assert again == exports[::-1]
