"""Pruning by relevance: the units of least relevance, as plain loops have it, and runs with all that is around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_cap import CAPPruningCallback, prune
from lightning_cap.calibration.relevance import UnitRelevance
from lightning_cap.errors import CAPError, ConfigError
from lightning_cap.pruners import LRPUnits
from lightning_cap.sparsity import Targets
from lightning_cap.utilities import distributed
from tests.references.relevance import relevance_of_small_net
from tests.support.processes import on_ranks
from tests.support.toy import Toy, loaders, trainer
from tests.support.units import cross_entropy, small_net, small_units

pytest.importorskip("zennit")


def test_the_units_of_least_share_of_their_layers_relevance_go_first() -> None:
    model, generator = small_net(torch.float64), torch.Generator().manual_seed(2)
    x, y = torch.randn(4, 2, 5, 5, generator=generator).double(), torch.tensor([0, 2, 1, 1])
    targets = small_units().targets(model)
    pruner = LRPUnits(num_inputs=4)
    assert isinstance(pruner.statistic, UnitRelevance)
    source = pruner.statistic.collector(model, targets, cross_entropy, [(x[:2], y[:2]), (x[2:], y[2:])])
    result = pruner.path(targets, source).at(0.4)

    sums: dict[str, Any] = {}
    for image, label in zip(x, y, strict=True):
        for name, found in relevance_of_small_net(model, image, int(label), 1e-6).items():
            sums[name] = sums.get(name, 0) + found
    order = sorted(
        (float(value / sums[name].abs().sum()), name, unit) for name in sums for unit, value in enumerate(sums[name])
    )
    kept = small_units().kept(result.masks)
    pruned = {(name, int(unit)) for name in kept for unit in (~kept[name]).nonzero()}
    assert pruned == {(name, unit) for _, name, unit in order[: len(pruned)]}
    assert {name for name, _ in pruned} == set(sums)
    assert result.predicted_loss is None


def test_harmful_units_go_before_those_that_do_nothing() -> None:
    units = small_units()
    rows = {name: torch.ones(2, size) for name, size in units.sizes.items()}
    rows["fc1"][:, 3], rows["fc1"][:, 5] = -2.0, 0.0
    masks = LRPUnits().path(units.targets(small_net()), [rows]).at(0.02).masks
    gone = ~masks["fc1.bias"]
    assert gone[3]
    path = LRPUnits().path(units.targets(small_net()), [rows])
    assert path.at(0.02).saliency < 0


def test_a_plain_model_is_pruned_and_its_kept_weights_stay() -> None:
    model, (x, y) = small_net(), (torch.randn(8, 2, 5, 5), torch.arange(8) % 3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    result = prune(model, [(x, y)], cross_entropy, 0.3, LRPUnits(num_inputs=8), progress=False)
    assert result.sparsity > 0.2
    for name, weight in model.state_dict().items():
        kept = result.masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert torch.equal(weight, before[name] * kept)


def test_a_run_of_the_trainer_is_the_same_when_it_goes_on(tmp_path: Path) -> None:
    def run(folder: str, ckpt: str | None = None) -> Toy:
        torch.manual_seed(0)
        module = Toy()
        cb = CAPPruningCallback(
            {1: 0.3, 2: 0.5}, LRPUnits(num_inputs=32), dirpath=str(tmp_path / folder), evaluate=False
        )
        trainer(tmp_path / folder, cb, max_epochs=3).fit(module, **loaders(), ckpt_path=ckpt)
        return module

    whole = run("whole").state_dict()
    again = run("again", str(tmp_path / "whole" / "parameters=0.30.ckpt")).state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())


def relevance_of_share() -> Any:
    """By the batches of this process, of all."""
    model, batches = small_net(), [(torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(i)), torch.arange(4) % 3)
                                   for i in range(4)]  # fmt: skip
    targets, pruner = small_units().targets(model), LRPUnits(num_inputs=14)
    source = pruner.statistic.collector(
        model, targets, cross_entropy, batches[distributed.rank() :: distributed.world_size()]
    )
    result = pruner.path(targets, source).at(0.4)
    return result.saliency, dict(result.masks)


@pytest.mark.xdist_group("processes")
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    saliency, masks = relevance_of_share()
    for found, same in on_ranks(2, tmp_path, relevance_of_share):
        assert found == pytest.approx(saliency, rel=1e-5)
        assert all(torch.equal(mask, masks[name]) for name, mask in same.items())


def test_without_zennit_one_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"LRPUnits needs the package zennit.*pip install 'lightning-cap\[relevance\]'"
    ):
        LRPUnits()


def test_single_weights_are_refused() -> None:
    with pytest.raises(CAPError, match="no units"):
        LRPUnits().check(Targets({"fc.weight": torch.ones(3, 4)}))
