"""The plan of a comparison."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_cap.errors import CAPError, ConfigError, UnsupportedError
from lightning_cap.planning.machine import Settings
from lightning_cap.pruners import CAP, DiagonalFisher, DropAndGrow, LayerwiseOBS, Magnitude
from tests.support.planned import planned_oneshot

CAP_16 = CAP(block_size=16, num_gradients=64, damp=1e-5)


def test_one_path_gives_all_sparsities() -> None:
    plan = planned_oneshot(settings=Settings())
    (pruner,) = plan.pruning
    assert [(event.goal, event.collections) for event in pruner.events] == [(0.5, 1), (0.75, 0)]
    assert pruner.seconds is not None
    assert pruner.events[1].seconds == pruner.seconds["apply"]
    assert plan.timeline is None
    assert plan.files == ()
    steps = planned_oneshot(num_recomputations=2).pruning[0]
    assert [event.collections for event in steps.events] == [2, 2]


def test_rows_are_kept_for_several_pruners(tmp_path: Path) -> None:
    pruners = {"CAP": CAP_16, "OBD": DiagonalFisher(num_gradients=32, damp=1e-5), "magnitude": Magnitude()}
    folder = tmp_path / "results"
    plan = planned_oneshot(pruners=pruners, seeds=(0, 1), folder=folder)
    by_label = {pruner.label: pruner for pruner in plan.pruning}
    assert (by_label["CAP"].cached, by_label["OBD"].cached, by_label["magnitude"].cached) == ("memory", "memory", "")
    assert by_label["CAP"].cached_bytes == 64 * 4 * plan.choices[0].pruned
    assert by_label["OBD"].cached_bytes == 0
    assert {pruner.seeds for pruner in plan.pruning} == {2}
    assert not folder.exists(), "nothing is written"
    on_disk = planned_oneshot(pruners=pruners, folder=folder, max_rows_memory="1kB")
    assert on_disk.pruning[0].cached == "disk"
    assert planned_oneshot(pruners=pruners, max_rows_memory="1kB").pruning[0].cached == ""


def test_collecting_is_counted_once() -> None:
    pruners = {"CAP": CAP_16, "OBD": DiagonalFisher(num_gradients=32, damp=1e-5), "layers": LayerwiseOBS(num_inputs=32)}
    plan = planned_oneshot(settings=Settings(), pruners=pruners)
    collect = {pruner.label: pruner.seconds["collect"] for pruner in plan.pruning if pruner.seconds}
    assert collect["CAP"] > 0
    assert collect["OBD"] == 0
    assert collect["layers"] > 0


def test_files_are_counted(tmp_path: Path) -> None:
    plan = planned_oneshot(folder=tmp_path / "out")
    count = {file.name: file.count for file in plan.files}
    assert count == {
        "results.jsonl": 1,
        "masks/*0.50.safetensors": 1,
        "masks/*0.75.safetensors": 1,
        "pruned weights (*.safetensors)": 2,
    }


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"sparsities": [1.5]}, CAPError, "sparsities=1.5"),
        ({"pruners": {"rigl": DropAndGrow()}}, UnsupportedError, "one-shot pruning does not train"),
        ({"grids": {"dump": [1]}}, ConfigError, "no pruner of"),
        ({"include": ["nothing"]}, CAPError, "matches no parameter"),
    ],
)
def test_what_a_comparison_refuses_is_refused(given: dict[str, object], error: type[CAPError], told: str) -> None:
    with pytest.raises(error, match=told):
        planned_oneshot(**given)
