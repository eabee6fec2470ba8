"""A comparison that was stopped, killed or changed goes on with what it has."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_cap.comparison import recorder
from lightning_cap.comparison.records import load_masks
from lightning_cap.errors import DataError
from lightning_cap.export.records import ExportRecord
from lightning_cap.pruners import Magnitude
from lightning_cap.utilities.records import read_records, write_records
from tests.support.comparing import assert_close, collections, comparable, measured, paths, results, run, toy
from tests.support.processes import FORKED
from tests.support.toy import cap


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = comparable(run(tmp_path / "whole", max_rows_memory=1))
    evaluate, left = recorder.Measure.metrics, [5]

    def failing(self: Any, solution: str) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("killed")
        return evaluate(self, solution)

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Measure, "metrics", failing)
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


def test_records_that_nobody_asks_for_this_time_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruners = {"CAP": cap(), "GM": Magnitude()}
    whole = run(tmp_path, pruners, seeds=(0, 1))
    solved, counts = paths(monkeypatch), collections(monkeypatch)
    less = run(tmp_path, pruners, [0.5], seeds=(0,))
    assert less == [r for r in whole if r.seed in (None, 0) and r.goal in (0.0, 0.5)]
    assert run(tmp_path, {"GM": Magnitude()}, seeds=(1,)) == [r for r in whole if r.pruner == "unpruned"] + [
        r for r in whole if (r.pruner, r.seed) == ("GM", 1)
    ]
    assert sorted(map(str, results(tmp_path))) == sorted(map(str, whole))
    assert run(tmp_path, pruners, seeds=(0, 1)) == whole
    assert solved == counts == []
    assert {file.name for file in (tmp_path / "masks").iterdir()} == {Path(r.masks).name for r in whole[1:]}


def test_a_record_takes_the_place_of_one_with_the_same_files(tmp_path: Path) -> None:
    run(tmp_path, {"CAP": cap(), "GM": Magnitude()}, [0.5], save_weights=True)
    run(tmp_path, {"CAP": cap(damp=1e-2), "c-ap": cap()}, [0.5])
    found = results(tmp_path)
    assert [(r.label, r.parameters.get("damp")) for r in found] == [
        ("unpruned", None), ("CAP", 1e-2), ("c-ap", 1e-4), ("GM", None),
    ]  # fmt: skip
    run(tmp_path, {"C AP": cap()}, [0.5])
    assert [r.label for r in results(tmp_path)] == ["unpruned", "C AP", "CAP", "GM"]


def test_weights_of_another_seed_are_not_taken_for_a_records_own(tmp_path: Path) -> None:
    (_, first) = run(tmp_path, Magnitude(), [0.5], seeds=(0,))
    (_, second) = run(tmp_path, Magnitude(), [0.5], seeds=(1,))
    assert first.weights == second.weights != ""
    assert {r.seed: r.weights for r in results(tmp_path)} == {None: "", 1: second.weights, 0: ""}


def test_masks_of_another_model_are_removed(tmp_path: Path) -> None:
    run(tmp_path, {"CAP": cap(), "GM": Magnitude()}, seeds=(0, 1))
    (tmp_path / "masks/mine.txt").write_text("not ours")
    other = toy()
    with torch.no_grad():
        other.net[6].bias.add_(1e-3)
    records = run(tmp_path, {"GM": Magnitude()}, [0.5], module=other)
    assert results(tmp_path) == records
    assert {file.name for file in (tmp_path / "masks").iterdir()} == {"mine.txt", Path(records[1].masks).name}


def test_nothing_outside_the_folder_of_masks_is_removed(tmp_path: Path) -> None:
    records = run(tmp_path / "out", {"GM": Magnitude()}, [0.5])
    (tmp_path / "mine.txt").write_text("not ours")
    foreign = replace(records[1], depends={}, label="x", masks="../mine.txt")
    inside = replace(foreign, label="y", masks="masks/../results.jsonl")
    write_records(tmp_path / "out/results.jsonl", [*records, foreign, inside])
    assert run(tmp_path / "out", {"GM": Magnitude()}, [0.5]) == records
    assert results(tmp_path / "out") == records
    assert (tmp_path / "mine.txt").exists()


def test_other_loss_samples_are_another_loss_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruners = {"CAP": cap(), "GM": Magnitude()}
    want = comparable(run(tmp_path / "fresh", pruners, loss_samples=48, grids={"damp": [1e-2]}))
    first = run(tmp_path / "again", pruners, loss_samples=16, grids={"damp": [1e-2]})
    solved, counts, validated = paths(monkeypatch), collections(monkeypatch), measured(monkeypatch)
    again = run(tmp_path / "again", pruners, loss_samples=48, grids={"damp": [1e-2]})
    assert comparable(again) == want
    assert [r.loss_increase for r in again[1:]] != [r.loss_increase for r in first[1:]]
    assert [r.seconds for r in again] == [r.seconds for r in first]
    assert run(tmp_path / "again", pruners, loss_samples=0, grids={"damp": [1e-2]}) == again
    assert solved == counts == validated == []


def test_without_the_weights_a_loss_is_measured_of_a_new_solution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruners = {"CAP": cap(), "GM": Magnitude()}
    first = run(tmp_path, pruners, [0.5], loss_samples=16, save_weights=False)
    solved, validated = paths(monkeypatch), measured(monkeypatch)
    again = run(tmp_path, pruners, [0.5], loss_samples=48, save_weights=False)
    assert solved == ["CAP/0"]  # magnitude's are the model's own, masked
    assert validated == []
    assert [r.solution for r in again] == [r.solution for r in first]


def test_damaged_masks_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = run(tmp_path, {"CAP": cap()}, [0.5], loss_samples=16)
    (tmp_path / first[1].masks).write_bytes(b"damaged")
    solved = paths(monkeypatch)
    again = run(tmp_path, {"CAP": cap()}, [0.5], loss_samples=48)
    assert solved == ["CAP/0"]
    assert "it holds no masks" in caplog.text
    assert load_masks(tmp_path / again[1].masks)


def test_weights_are_written_later_without_solving_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "now", {"CAP": cap()}, [0.5], save_weights=True)
    run(tmp_path / "later", {"CAP": cap()}, [0.5])
    solved = paths(monkeypatch)
    run(tmp_path / "later", {"CAP": cap()}, [0.5], save_weights=True)
    assert solved == []
    now, later = (load_file(tmp_path / name / "CAP/sparsity=0.50.safetensors") for name in ("now", "later"))
    assert all(torch.equal(value, later[name]) for name, value in now.items())


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
