"""The path of `CAP` on 1, 2 and 4 real gloo processes: one answer, or one error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_cap.calibration.batches import CalibrationBatches
from lightning_cap.calibration.gradients import GradientCollector, rows_at_once
from lightning_cap.errors import CAPError, GradientError
from lightning_cap.fisher.blocks import EmpiricalFisher
from lightning_cap.pruners import CAP
from lightning_cap.sparsity.allocation import Uniform
from lightning_cap.sparsity.patterns import NofM
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed
from tests.support.memory import with_passes
from tests.support.processes import on_ranks
from tests.support.toy import ToyData, loss, plain_net

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged": {"samples_per_gradient": 3},
    "cumulative": {"ranking": "cumulative"},
    "uniform": {"allocation": Uniform()},
    "2:4": {"pattern": NofM(2, 4)},
    "float64": {"damp": 1e-8, "shrinkage": 0.0},
    "full": {"storage": "full", "backend": "torch"},
    "few blocks": {"block_size": 2048},
    "skipped": {},
    "passes": {"shrinkage": 0.0},  # passes pool their own blocks alone
    "ties": {},
}


class Poisoned(nn.Module):
    """A network whose output is not finite for some of the samples, whichever rank has them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain_net()

    def forward(self, x: Tensor) -> Tensor:
        bad = (x[:, :1] * 1000).floor().remainder(7) == 0
        return self.net(x) * torch.where(bad, torch.nan, 1.0)


def run_cases() -> dict[str, Any]:
    """Every case on this rank; what must not depend on the number of ranks, and what shows that the work was shared."""
    out: dict[str, Any] = {}
    for name, settings in CASES.items():
        model = (Poisoned() if name == "skipped" else plain_net()).eval()
        targets = Targets.from_model(model, include=["*1.weight", "*3.weight"])
        make = partial(CAP, **{"block_size": 32, "num_gradients": 50, "damp": 1e-3, **settings})
        pruner = make()
        m = pruner.samples_per_gradient
        loader = DataLoader(ToyData(), batch_size=8)
        batches = CalibrationBatches(loader, 50 * m, m, 3, 0, rows_at_once(targets))
        source: Any = GradientCollector(model, targets, loss, batches, 50, m)
        if name == "ties":
            source = _Equal(targets)
        if name == "passes":
            pruner = with_passes(2, make, targets, source.memory())
        masks = {"1.weight": torch.ones(24, 12, dtype=torch.bool)} if name == "plain" else None
        if masks:
            masks["1.weight"][:3] = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = pruner.path(targets, source, masks)
        result = path.at(0.5 if settings.get("pattern") else 0.7)
        out[name] = {
            "weights": dict(result.weights),
            "masks": dict(result.masks),
            "loss": result.predicted_loss,
            "curve": [] if settings.get("pattern") else path.curve([0.4, 0.8]),
            "collected": getattr(source, "collected", None),
            "skipped": getattr(source, "skipped", None),
            "stats": dict(path.stats),
            "own": len(path._own),
            "passes": path.plan.passes,
        }
    out["zero gradients"] = {"everywhere": _told(1.0, ranks=()), "elsewhere": _told(1.0, ranks=(0,))}
    return out


def _told(gradient: float, ranks: Sequence[int]) -> str:
    """The error where only some ranks have gradients that are not zero; empty if there is none."""
    targets = Targets.from_model(plain_net(), include=["*1.weight", "*3.weight"])
    value = gradient if distributed.rank() in ranks else 0.0
    try:
        CAP(block_size=32).path(targets, [{n: torch.full((2, *w.shape), value) for n, w in targets.items()}])
    except GradientError as error:
        return str(error)
    return ""


class _Equal:
    """A row in which all gradients but one are zero: nearly every score is the same."""

    def __init__(self, targets: Targets) -> None:
        self.targets = targets

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for weight in self.targets.weights().values():
            weight.fill_(1.0)
        rows = {name: torch.zeros(1, *w.shape) for name, w in self.targets.items()}
        for row in rows.values():
            row[0, 0, 0] = 1e-3
        yield rows


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return {1: [run_cases()], 2: on_ranks(2, folder, run_cases), 4: on_ranks(4, folder, run_cases)}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_one_answer_on_any_number_of_processes(found: Any, case: str, world: int) -> None:
    one = found[1][0][case]
    for rank in found[world]:
        other = rank[case]
        assert other["collected"] == one["collected"]
        assert other["skipped"] == one["skipped"]
        for name in one["masks"]:
            assert torch.equal(one["masks"][name], other["masks"][name])
            torch.testing.assert_close(one["weights"][name], other["weights"][name], rtol=1e-5, atol=1e-7)
            assert torch.equal(other["weights"][name], found[world][0][case]["weights"][name]), "equal on all ranks"
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["curve"] == pytest.approx(one["curve"], rel=1e-5)
        assert other["stats"]["blocks_float64"] == one["stats"]["blocks_float64"]


@pytest.mark.parametrize("world", [2, 4])
def test_blocks_are_shared_out_evenly(found: Any, world: int) -> None:
    for case in CASES:
        own = [rank[case]["own"] for rank in found[world]]
        assert sum(own) == found[1][0][case]["own"]
        assert max(own) - min(own) <= 1
    assert found[world][0]["few blocks"]["own"] == 1
    assert found[1][0]["skipped"]["skipped"] > 0
    assert found[1][0]["float64"]["stats"]["blocks_float64"] > 0
    assert found[1][0]["passes"]["passes"] == 2


def fail_on_rank_1(where: str) -> str:
    import lightning_cap.pruners.blockwise as blockwise
    import lightning_cap.pruners.cap as cap

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the lights went out")

    model = plain_net().eval()
    targets = Targets.from_model(model, include=["*1.weight", "*3.weight"])
    if distributed.rank() == 1:
        if where == "solve":
            cap.eliminate = broken
        if where == "reconstruct":
            blockwise.reconstruct = broken
        if where == "finish":
            EmpiricalFisher._check = broken  # type: ignore[method-assign]
    failing = broken if where == "collect" and distributed.rank() == 1 else loss
    batches = CalibrationBatches(DataLoader(ToyData(), batch_size=8), 40, 1, 3, 0)
    try:
        CAP(block_size=32, num_gradients=40, damp=1e-3).path(
            targets, GradientCollector(model, targets, failing, batches, 40)
        ).at(0.5)
    except (RuntimeError, CAPError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("where", ["collect", "solve", "reconstruct", "finish"])
def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path, where: str) -> None:
    texts = on_ranks(2, tmp_path, fail_on_rank_1, where)
    assert "the lights went out" in texts[0]
    assert "rank 1" in texts[0]
    assert texts[1] == "RuntimeError: the lights went out"


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_zero_gradients_on_all_ranks_together_are_refused_on_each(
    found: dict[int, list[dict[str, Any]]], ranks: int
) -> None:
    told = [own["zero gradients"] for own in found[ranks]]
    assert all(f"all {2 * ranks} are zero" in each["everywhere"] for each in told)
    assert all(each["elsewhere"] == "" for each in told)
