"""Every pruner on two real gloo processes gives what it gives on one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cap.calibration.batches import CalibrationBatches
from lightning_cap.calibration.gradients import rows_at_once
from lightning_cap.errors import GradientError
from lightning_cap.pruners import (
    CAP,
    MFAC,
    DiagonalFisher,
    FastCAP,
    GradientTimesWeight,
    LayerwiseOBS,
    Pruner,
    Random,
    Taylor,
    WoodFisher,
)
from lightning_cap.sparsity.allocation import ERK, Global
from lightning_cap.sparsity.patterns import BlockOf, NofM, OutputRows
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from tests.support.ranks import on_ranks
from tests.support.toy import ToyData

ROWS = 40
GIVEN: dict[str, Any] = {"num_gradients": ROWS, "damp": 1e-3}
CASES: dict[str, Pruner] = {
    "woodfisher": WoodFisher(block_size=16, **GIVEN),
    "woodfisher simple": WoodFisher(block_size=16, **GIVEN, update="simple"),
    "woodfisher groups": WoodFisher(block_size=16, **GIVEN, pattern=BlockOf(4), allocation=Global(0.3)),
    "cap groups": CAP(block_size=16, **GIVEN, pattern=BlockOf(4)),
    "cap groups cumulative": CAP(
        block_size=16, **GIVEN, pattern=BlockOf(4), ranking="cumulative", allocation=Global(0.3)
    ),
    "cap floor": CAP(block_size=16, **GIVEN, allocation=Global(0.3)),
    "cap erk": CAP(block_size=16, **GIVEN, allocation=ERK()),
    "mfac": MFAC(block_size=64, **GIVEN),
    "mfac static": MFAC(block_size=64, **GIVEN, mode="static"),
    "mfac few blocks": MFAC(block_size=2048, **GIVEN),
    "fast-cap": FastCAP(block_size=16, **GIVEN),
    "fast-cap 2:4": FastCAP(block_size=16, **GIVEN, pattern=NofM(2, 4)),
    "layerwise": LayerwiseOBS(block_size=12, num_inputs=ROWS),
    "layerwise global": LayerwiseOBS(block_size=8, num_inputs=ROWS, allocation=Global(), pattern=BlockOf(4)),
    "obd": DiagonalFisher(**GIVEN),
    "obd rows": DiagonalFisher(**GIVEN, pattern=OutputRows()),
    "grw": GradientTimesWeight(num_gradients=ROWS),
    "taylor": Taylor(num_gradients=ROWS),
    "random": Random(seed=1),
}


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 4))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def run_cases() -> dict[str, Any]:
    """Every case on this rank."""
    out: dict[str, Any] = {}
    for name, pruner in CASES.items():
        model = _net().eval()
        targets = Targets.from_model(model, include=["*1.weight", "*3.weight"])
        batches = CalibrationBatches(DataLoader(ToyData(), batch_size=8), ROWS, 1, 3, 0, rows_at_once(targets))
        masks = {n: torch.ones(w.shape, dtype=torch.bool) for n, w in targets.items()}
        masks["1.weight"][:3] = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            statistic = pruner.statistic
            source = () if statistic is None else statistic.collector(model, targets, loss, batches)
            path = pruner.path(targets, source, masks)
        result = path.at(pruner.pattern.sparsity or 0.6)
        curve = [] if pruner.pattern.sparsity else path.curve([0.4, 0.65])
        out[name] = {"weights": dict(result.weights), "masks": dict(result.masks), "loss": result.predicted_loss,
                     "curve": curve}  # fmt: skip
    out["no rows"] = _without_rows()
    return out


def _without_rows() -> dict[str, Any]:
    """A source that has all of its rows on rank 0, and one that has none anywhere."""
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.randn(20, 6, 8, generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {}
    for pruner in (
        FastCAP(block_size=8, num_gradients=20, damp=1e-2),
        DiagonalFisher(num_gradients=20),
        GradientTimesWeight(num_gradients=20),
    ):
        name, targets = type(pruner).__name__, Targets({"a": weight})
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
