"""`CAP` on a model that `fully_shard` has shared out over 1, 2 and 4 gloo processes: the masks of one process."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_cap.errors import UnsupportedError
from lightning_cap.pruners import CAP, Magnitude, WoodFisher
from lightning_cap.sparsity.allocation import ERK, Global
from lightning_cap.sparsity.masks import MaskSet
from lightning_cap.sparsity.patterns import BlockOf, NofM
from lightning_cap.sparsity.targets import Targets
from lightning_cap.utilities import distributed, sharded
from tests.support.processes import on_ranks
from tests.support.sharding import NAMES, image_loader, make_net, make_sharded
from tests.support.toy import loss

GIVEN: dict[str, Any] = {
    "block_size": 32,
    "num_gradients": 20,
    "samples_per_gradient": 3,
    "damp": 1e-3,
    "shrinkage": 0.0,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "per sample": {"samples_per_gradient": 1},
    "shrunk": {"shrinkage": 0.6, "damp": "auto"},
    "2:4": {"pattern": NofM(2, 4)},
    "groups": {"pattern": BlockOf(4), "allocation": Global(0.2)},
    "ERK": {"allocation": ERK(), "ranking": "cumulative"},
    "long blocks": {"block_size": 700},
    "woodfisher": {"pruner": WoodFisher},
    "no batch for some": {"num_gradients": 4},
}


def run_cases(fully_sharded: bool) -> dict[str, Any]:
    """Every case on this rank, as whole weights."""
    out = {}
    for name, settings in CASES.items():
        given = {**GIVEN, **settings}
        kind = given.pop("pruner", CAP)
        pruner = kind(**given)
        model = (make_sharded() if fully_sharded else make_net()).eval()
        targets = Targets.from_model(model, include=NAMES[:1] if pruner.pattern.group_size > 1 else NAMES)
        masks = MaskSet(targets)
        masks.update({NAMES[0]: torch.arange(12 * 8 * 9).view(12, 8, 3, 3) >= (0 if pruner.pattern.sparsity else 72)})
        statistic = pruner.statistic
        source = statistic.collector(model, targets, loss, statistic.batches(image_loader(), targets, (3, 0)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner.plan(targets, masks, source=source.memory())
            with pruner.path(targets, source, masks) as path:
                result = path.at(pruner.pattern.sparsity or 0.7)
        result.apply(targets)
        out[name] = {
            "weights": {n: sharded.whole(w).clone() for n, w in result.weights.items()},
            "masks": {n: sharded.whole(m).clone() for n, m in result.masks.items()},
            "applied": {n: sharded.whole(w).clone() for n, w in targets.weights().items()},
            "loss": result.predicted_loss,
            "sparsity": result.sparsity,
            "own": len(path._own),
            "collected": source.collected,
            "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        }
    return out


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return run_cases(False)


@pytest.fixture(scope="module", params=[("ddp", 2), ("fsdp", 1), ("fsdp", 2), ("fsdp", 4)], ids=str)
def several(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    how, world = request.param
    return on_ranks(world, tmp_path_factory.mktemp("ranks"), run_cases, how == "fsdp")


@pytest.mark.parametrize("case", CASES)
def test_masks_are_those_of_one_process_bit_for_bit(one: Any, several: Any, case: str) -> None:
    wanted = one[case]
    for rank in several:
        found = rank[case]
        assert found["collected"] == wanted["collected"] == CASES[case].get("num_gradients", 20)
        assert found["sparsity"] == wanted["sparsity"]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert not found["gradients"], "a trace of the calibration"
        for name, mask in wanted["masks"].items():
            assert torch.equal(found["masks"][name], mask)
            torch.testing.assert_close(found["weights"][name], wanted["weights"][name], rtol=1e-5, atol=1e-7)
            assert torch.equal(found["applied"][name], found["weights"][name])
            if case == "plain":  # a row by row everywhere, in the same order
                assert torch.equal(found["weights"][name], wanted["weights"][name])
    assert sum(rank[case]["own"] for rank in several) == wanted["own"]


BY_MAGNITUDE: dict[str, Magnitude] = {
    "plain": Magnitude(),
    "ERK": Magnitude(allocation=ERK(min_density=0.2)),
    "2:4": Magnitude(pattern=NofM(2, 4)),
}


def prune_by_magnitude(fully_sharded: bool) -> dict[str, Any]:
    out = {}
    for name, pruner in BY_MAGNITUDE.items():
        model = (make_sharded() if fully_sharded else make_net()).eval()
        targets = Targets.from_model(model, include=NAMES[:1] if name == "2:4" else NAMES)
        path = pruner.path(targets)
        result = path.at(pruner.pattern.sparsity or 0.7)  # type: ignore[union-attr]
        masks = {n: sharded.whole(m).clone() for n, m in result.masks.items()}
        curve = [0.0] if name == "2:4" else path.curve([0.5])
        out[name] = masks, result.sparsity, result.saliency, curve
    return out


@pytest.mark.parametrize("world", [1, 2, 4])
def test_magnitude_gives_the_masks_of_one_process(tmp_path: Path, world: int) -> None:
    wanted = prune_by_magnitude(False)
    for rank in on_ranks(world, tmp_path, prune_by_magnitude, True):
        for name, (masks, sparsity, saliency, curve) in wanted.items():
            found = rank[name]
            assert found[1] == sparsity
            assert found[2] == pytest.approx(saliency)
            assert found[3] == pytest.approx(curve)
            assert all(torch.equal(found[0][n], mask) for n, mask in masks.items())


def refusals() -> list[str]:
    """Of what needs whole weights, and of a model that is sharded in part."""
    model = make_sharded().eval()
    targets = Targets.from_model(model, include=NAMES)
    told = []
    whole_groups = Magnitude(pattern=BlockOf(4))
    for refused in (
        lambda: prepare_(whole_groups, targets),
        lambda: prepare_(CAP(ranking="auto"), targets),
        lambda: Targets.from_model(_half_sharded(), include=NAMES),
    ):
        with pytest.raises(UnsupportedError) as caught:
            refused()
        told.append(str(caught.value))
    return told


def prepare_(pruner: Any, targets: Targets) -> Any:
    from lightning_cap.pruners.base import prepare

    return prepare(pruner, targets, None, None)


def _half_sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    model = make_net()
    assert isinstance(model, nn.Sequential)
    fully_shard(model[2], mesh=init_device_mesh("cpu", (distributed.world_size(),)))
    return model


def test_what_needs_whole_weights_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    for magnitude, auto, half in on_ranks(2, tmp_path_factory.mktemp("refused"), refusals):
        assert "pruner=Magnitude: with these settings it cannot prune sharded weights" in magnitude
        assert "pruner=CAP: with these settings" in auto
        assert "ranking='auto' needs whole weights" in auto
        assert "CAP" in magnitude
        assert "'5.weight' is not sharded, and '2.weight' is" in half
