"""Every pruner on two real gloo processes gives what it gives on one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_cap.calibration.batches import CalibrationBatches
from lightning_cap.calibration.gradients import GradientCollector, rows_at_once
from lightning_cap.calibration.layer_inputs import InputCollector
from lightning_cap.errors import GradientError
from lightning_cap.sparsity.allocation import ERK, Allocation, Global, Uniform
from lightning_cap.sparsity.patterns import BlockOf, NofM, OutputRows, Pattern
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from tests.support.processes import on_ranks
from tests.support.pruners import METHODS, USUAL, Case, select
from tests.support.toy import ToyData, loss, plain_net

ROWS = 40
GIVEN: dict[str, Any] = {"block_size": 16, "num_gradients": ROWS, "num_inputs": ROWS, "damp": 1e-3}
HOWS: dict[str, tuple[Pattern, Allocation]] = {
    "groups": (BlockOf(4), Global(0.3)),
    "2:4": (NofM(2, 4), Uniform()),
    "rows": (OutputRows(), ERK()),
}
CASES: dict[str, tuple[Case, dict[str, Any]]] = {
    **{name: (case, {}) for name, case in select(regrows=False).items()},
    **{
        f"{name}, {how}": (case, {"pattern": pattern, "allocation": allocation})
        for name, case in USUAL.items()
        for how, (pattern, allocation) in HOWS.items()
        if case.takes(pattern)
    },
}


def run_cases() -> dict[str, Any]:
    """Every case on this rank."""
    out: dict[str, Any] = {}
    for name, (case, how) in CASES.items():
        pruner = case.pruner(**GIVEN, **how)
        model = plain_net().eval()
        targets = Targets.from_model(model, include=["*1.weight", "*3.weight"])
        batches = CalibrationBatches(DataLoader(ToyData(), batch_size=8), ROWS, 1, 3, 0, rows_at_once(targets))
        collector = InputCollector if case.reads == "inputs" else GradientCollector
        masks = {n: torch.ones(w.shape, dtype=torch.bool) for n, w in targets.items()}
        masks["1.weight"][:3] = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = pruner.path(targets, collector(model, targets, loss, batches, ROWS), masks)
        result = path.at(pruner.pattern.sparsity or 0.6)
        curve = [] if pruner.pattern.sparsity else path.curve([0.4, 0.65])
        out[name] = {"weights": dict(result.weights), "masks": dict(result.masks), "loss": result.saliency,
                     "curve": curve}  # fmt: skip
    out["no rows"] = _without_rows()
    return out


def _without_rows() -> dict[str, Any]:
    """A source that has all of its rows on rank 0, and one that has none anywhere."""
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(20, 6, 8, generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {}
    for name in ("FastCAP", "DiagonalFisher", "GradientTimesWeight"):
        pruner, targets = METHODS[name].pruner(block_size=8, num_gradients=20), Targets({"a": weight})
        given = [{"a": rows}] if distributed.rank() == 0 else []
        found[name] = pruner.path(targets, given).at(0.5).weights["a"]
        try:
            pruner.path(targets, [])
        except GradientError as error:
            found[f"{name} error"] = str(error)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    return {1: [run_cases()], 2: on_ranks(2, tmp_path_factory.mktemp("ranks"), run_cases)}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(found: Any, case: str) -> None:
    one = found[1][0][case]
    assert sum(int((~mask).sum()) for mask in one["masks"].values()) > 0.45 * 768
    for rank in found[2]:
        other = rank[case]
        for name, mask in one["masks"].items():
            assert torch.equal(mask, other["masks"][name])
            torch.testing.assert_close(one["weights"][name], other["weights"][name], rtol=1e-5, atol=1e-6)
            assert torch.equal(other["weights"][name], found[2][0][case]["weights"][name]), "equal on both ranks"
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["curve"] == pytest.approx(one["curve"], rel=1e-5)


def test_a_process_without_rows_is_not_waited_for(found: Any) -> None:
    one = found[1][0]["no rows"]
    assert len(one) == 6
    for rank in found[2]:
        for name, value in rank["no rows"].items():
            if isinstance(value, str):
                assert "the source gave no gradient row" in value
            else:
                torch.testing.assert_close(value, one[name], rtol=1e-5, atol=1e-6)
