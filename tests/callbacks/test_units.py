"""Units are pruned while training goes on: all entries of a unit together, to a share of what the goals count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_cap import CAPPruningCallback
from lightning_cap.callbacks.state import pruned_units
from lightning_cap.errors import ConfigError, DataError, TargetError, UnsupportedError
from lightning_cap.pruners import CAPUnits, MagnitudeUnits, Pruner, TaylorUnits
from lightning_cap.sparsity import Flops, Parameters, Units
from lightning_cap.sparsity.unit_prices import UnitPrices
from lightning_cap.trainer.records import EventRecord
from lightning_cap.utilities.records import read_records
from tests.support.stopping import averaging
from tests.support.toy import Toy, callback, loaders, trainer
from tests.support.unit_runs import Holds, kept, units

pytestmark = pytest.mark.usefixtures("seeded")

PRUNERS: dict[str, Pruner] = {
    "CAPUnits": CAPUnits(num_gradients=48),
    "TaylorUnits": TaylorUnits(num_gradients=32),
    "MagnitudeUnits": MagnitudeUnits(),
}


@pytest.mark.parametrize("name", PRUNERS)
def test_a_gradual_run(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    module, holds = Toy(), Holds()
    cb = units(pruner=PRUNERS[name], num_recomputations=2, dirpath=str(tmp_path))
    with caplog.at_level("INFO"):
        t = trainer(tmp_path, cb, holds, max_epochs=5)
        t.fit(module, **loaders())
    assert "Pruning 16 neurons in 1 group, 16 channels in 1 group" in caplog.text
    assert "Goals count flops: 1024 FLOPs dense, 716.8 FLOPs at goal 0.3, 512 FLOPs at goal 0.5" in caplog.text
    first, second = read_records(tmp_path / "events.jsonl", EventRecord)
    for record, goal in ((first, 0.3), (second, 0.5)):
        assert record.saving is not None
        assert goal <= record.saving.share < goal + 0.06, "to one unit"
        assert record.saving.price == pytest.approx(1024 * (1 - record.saving.share))
        assert record.logged()["cap/flops"] == record.saving.share
        assert f"flops {record.saving.share:.2f}, predicted {record.saving.price:.3g} FLOPs" in caplog.text
    assert float(t.callback_metrics["flops"]) == pytest.approx(second.saving.share)  # type: ignore[union-attr]
    steps = [masked for (masked,) in holds.seen]
    assert steps == sorted(steps)
    assert [len(set(steps[i : i + 4])) for i in range(0, 20, 4)] == [1] * 5
    left = kept(cb)
    assert min(left.values()) > 0
    norm, pruned = module.net[1], ~cb.masks["net.1.weight"]
    assert int(pruned.sum()) == 16 - left["net.0"]
    assert torch.isfinite(norm.running_mean).all()
    assert torch.isfinite(norm.running_var).all()
    hidden = module.eval().net[:3](torch.randn(5, 12))
    assert not hidden[:, pruned].any()
    assert {p.name for p in tmp_path.glob("flops*")} == {
        f"flops={goal}.{kind}" for goal in ("0.30", "0.50") for kind in ("ckpt", "safetensors")
    }
    assert [record.saving.cost for record in cb.history if record.saving] == ["flops"] * 3


def test_what_goals_count(tmp_path: Path) -> None:
    """`cost` stands in place of the pruner's own; weights of units are not called a sparsity."""
    found = {}
    for cost in (Parameters(), Flops()):
        torch.manual_seed(3)
        cb = units({0: 0.5}, pruner=MagnitudeUnits(cost=Parameters()), cost=cost, dirpath=str(tmp_path))
        t = trainer(tmp_path, cb, max_epochs=1)
        t.fit(Toy(), **loaders())
        found[type(cost)] = kept(cb)
        assert cb.pruner.cost is cost
    assert {p.name for p in tmp_path.glob("*.ckpt")} == {"parameters=0.50.ckpt", "flops=0.50-v1.ckpt"}
    assert found[Parameters] != found[Flops]
    assert callback(pruner=MagnitudeUnits(cost=Flops())).pruner.cost.name == "flops"


def test_a_run_that_goes_on_is_not_traced_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(ckpt: Path | None = None) -> CAPPruningCallback:
        torch.manual_seed(4)
        cb = units({0: 0.3, 2: 0.5}, dirpath=str(tmp_path / "pruned"))
        trainer(tmp_path, cb, max_epochs=3).fit(Toy(), **loaders(), ckpt_path=None if ckpt is None else str(ckpt))
        return cb

    whole = fit()
    monkeypatch.setattr(Units, "from_model", None)
    again = fit(tmp_path / "pruned/flops=0.30.ckpt")
    assert kept(whole) == kept(again)
    assert str(whole._active.targets.units) == str(again._active.targets.units)


class Timed(Flops):
    """Must measure the model before it has prices, in a run that goes on too."""

    def __init__(self) -> None:
        self.folders: list[Path | None] = []

    def prepare(self, model: nn.Module, units: Units, example_input: Any, folder: Path | None = None) -> None:
        model(*example_input)
        self.folders.append(folder)

    def unit_prices(self, units: Units, shapes: Any) -> UnitPrices:
        assert self.folders, "nothing is timed yet"
        return super().unit_prices(units, shapes)


def test_a_cost_measures_the_model_before_it_is_asked(tmp_path: Path) -> None:
    cost = Timed()
    for ckpt in (None, str(tmp_path / "flops=0.30.ckpt")):
        cb = units({0: 0.3, 1: 0.5}, cost=cost, dirpath=str(tmp_path))
        trainer(tmp_path, cb, max_epochs=2).fit(Toy(), **loaders(), ckpt_path=ckpt)
        assert cost.folders == [tmp_path]
        cost.folders.clear()


def test_the_same_model_is_not_traced_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cb, module = units({0: 0.3}, save="none"), Toy()
    trainer(tmp_path, cb, max_epochs=1).fit(module, **loaders())
    first = kept(cb)
    monkeypatch.setattr(Units, "from_model", None)
    trainer(tmp_path, cb, max_epochs=1).fit(module, **loaders())
    assert kept(cb) == first


def test_a_checkpoint_tells_units_and_masks(tmp_path: Path) -> None:
    cb = units({0: 0.5}, dirpath=str(tmp_path))
    trainer(tmp_path, cb, max_epochs=1).fit(Toy(), **loaders())
    states = torch.load(tmp_path / "flops=0.50.ckpt", weights_only=True)["callbacks"]
    assert [key for key in states if "CAPPruning" in key] == ["CAPPruningCallback[units]"]
    found = pruned_units(states)
    assert found is not None
    assert {name: int(left.sum()) for name, left in found[0].kept(found[1]).items()} == kept(cb)
    assert pruned_units({"x": {"units": None}}) is None
    states["CAPPruningCallback[units]"]["units"]["groups"][0].pop("size")
    with pytest.raises(DataError, match="its 'units' cannot be read"):
        pruned_units(states)


def test_averaged_weights_are_masked(tmp_path: Path) -> None:
    holds = Holds()
    trainer(tmp_path, units({0: 0.3, 1: 0.5}, save="none"), averaging(), holds, max_epochs=2).fit(Toy(), **loaders())
    assert len(holds.seen) == 8


class Named(Toy):
    """Its model has another parameter beside, that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({"include": ["net.0"]}, ["net.0"]),
        ({"include": ["4"]}, ["net.4"]),
        ({"exclude": ["net.4"]}, ["net.0"]),
        ({}, ["net.0", "net.4"]),
    ],
)
def test_groups_are_chosen_by_name(tmp_path: Path, settings: dict[str, Any], groups: list[str]) -> None:
    cb = units({0: 0.1}, save="none", **settings)
    trainer(tmp_path, cb, max_epochs=1, limit_train_batches=1).fit(Named(), **loaders())
    assert list(kept(cb)) == groups


def test_an_unknown_group_is_refused_before_training(tmp_path: Path) -> None:
    module = Toy()
    with pytest.raises(TargetError, match=r"include.*'net.9'|include.*'9'"):
        trainer(tmp_path, units(include=["net.9"])).fit(module, **loaders())
    assert module.batches == []


def test_a_goal_beyond_one_unit_of_each_group_is_refused_before_training(tmp_path: Path) -> None:
    module = Toy()
    with pytest.raises(ConfigError, match=r"flops=0\.99: even with one unit per group"):
        trainer(tmp_path, units({0: 0.3, 2: 0.99})).fit(module, **loaders())
    assert module.batches == []


def test_a_model_that_is_called_in_parts_is_refused(tmp_path: Path) -> None:
    class Parts(Toy):
        def forward(self, x: Any) -> Any:
            return self.net[4:](self.net[:4](x))

    module = Parts()
    with pytest.raises(UnsupportedError, match=r"model=Parts.net: the training step calls parts of it"):
        trainer(tmp_path, units()).fit(module, **loaders())
    assert module.batches == []


def test_manual_optimization_needs_a_calibration_step(tmp_path: Path) -> None:
    class Manual(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(UnsupportedError, match="calibration_step"):
        trainer(tmp_path, units()).fit(Manual(), **loaders())


class Compiled(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")  # type: ignore[assignment]


class Frozen(Toy):
    """What its first layer makes stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


SETTINGS: dict[str, tuple[type[Toy], dict[str, Any]]] = {
    "bf16-mixed": (Toy, {"precision": "bf16-mixed"}),
    "bf16-true": (Toy, {"precision": "bf16-true"}),
    "accumulation": (Toy, {"accumulate_grad_batches": 3}),
    "fast_dev_run": (Toy, {"fast_dev_run": True}),
    "overfit": (Toy, {"overfit_batches": 1}),
    "compiled": (Compiled, {}),
    "frozen": (Frozen, {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_under_other_settings(tmp_path: Path, name: str) -> None:
    kind, options = SETTINGS[name]
    holds, cb = Holds(), units({0: 0.3}, pruner=TaylorUnits(num_gradients=16), save="none")
    t = trainer(tmp_path, cb, holds, **{"max_epochs": 1, **options})
    t.fit(kind(), **loaders())
    assert cb.pruner.reached(cb._active.targets, cb.masks) >= 0.3
    assert holds.seen[-1][0] > 0
    assert list(kept(cb)) == (["net.4"] if name == "frozen" else ["net.0", "net.4"])


def test_zeros_that_are_no_whole_unit_are_not_taken_as_pruned(tmp_path: Path) -> None:
    module, cb = Toy(), units({1: 0.3}, save="none")
    with torch.no_grad():
        module.net[0].weight[3] = 0
        for part in (module.net[4].weight[5], module.net[4].bias[5], module.net[6].weight[:, 5]):
            part.zero_()
    seen = []

    class Look(Holds):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            seen.append(kept(cb))

    trainer(tmp_path, cb, Look(), max_epochs=2).fit(module, **loaders())
    assert seen == [{"net.0": 16, "net.4": 15}]


def test_best_epochs_of_units(tmp_path: Path) -> None:
    cb = units({0: 0.3}, dirpath=str(tmp_path), save="both", monitor="val_acc")
    trainer(tmp_path, cb, max_epochs=3).fit(Toy(), **loaders())
    assert {p.name for p in tmp_path.glob("*.ckpt")} == {"flops=0.30.ckpt", "flops=0.30-best.ckpt"}
