"""Wrong input is refused before training begins, by name and with the remedy, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_cap import CAPPruningCallback
from lightning_cap.errors import CAPError, ConfigError, GradientError, ScheduleError, TargetError, UnsupportedError
from lightning_cap.pruners import CAP, DropAndGrow, LayerwiseOBS, Magnitude, Pruner
from lightning_cap.schedules import AlternatingSchedule, OneShot, PolynomialSchedule, SparsitySchedule, SparsitySteps
from lightning_cap.sparsity.allocation import Allocation, Global, PerTarget, Uniform
from lightning_cap.sparsity.patterns import NofM
from tests.support.toy import FEATURES, Toy, ToyData, callback, cap, loaders, trainer


class Steps(pl.Callback):
    """Counts training steps: none may have happened."""

    count = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.count += 1


def assert_refused(tmp_path: Path, error: type[CAPError], message: str, module: Any = None, **kwargs: Any) -> None:
    """``fit`` must raise before the first step, change nothing and write nothing."""
    data = kwargs.pop("data", None) or loaders()
    trainer_kwargs = kwargs.pop("trainer", {})
    module = module or Toy()
    before = [p.detach().clone() for p in module.parameters()]
    steps = Steps()
    with pytest.raises(error, match=message):
        trainer(tmp_path, callback(**kwargs), steps, **trainer_kwargs).fit(module, **data)
    assert steps.count == 0
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
    assert not list(tmp_path.rglob("*"))


def test_pattern_without_match_names_the_near_ones(tmp_path: Path) -> None:
    assert_refused(
        tmp_path, TargetError, r"'net\.4\.wieght' matches no parameter.*'net\.4\.weight'", include=["net.4.wieght"]
    )
    assert_refused(tmp_path, TargetError, r"exclude: '\*\.fc2\.\*' matches no parameter", exclude=["*.fc2.*"])


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, 50])
def test_sparsity_outside_its_range(sparsity: float) -> None:
    for make in (
        lambda: SparsitySteps({0: sparsity}),
        lambda: OneShot(sparsity),
        lambda: PolynomialSchedule(final=sparsity, start_epoch=0, end_epoch=2),
    ):
        with pytest.raises(ScheduleError, match=str(sparsity)):
            make()


def test_schedules_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="allow_decrease"):
        SparsitySteps({0: 0.5, 2: 0.3})
    assert_refused(tmp_path, ScheduleError, r"epoch 4.*max_epochs=4", schedule={4: 0.5})
    assert_refused(tmp_path, ScheduleError, "save_sparsities", schedule={1: 0.5}, save_sparsities=[0.6])
    assert_refused(tmp_path, CAPError, "gives 0.5 alone", schedule={1: 0.75}, pruner=cap(pattern=NofM(2, 4)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"block_size": -3}, "block_size=-3"),
        ({"damp": 0.0}, "damp=0.0"),
        ({"damp": -1e-8}, "damp=-1e-08"),
        ({"damp": float("nan")}, "damp=nan"),
        ({"num_gradients": 0}, "num_gradients=0"),
        ({"samples_per_gradient": 0}, "samples_per_gradient=0"),
        ({"ranking": "median"}, "ranking='median'"),
        ({"pattern": 124}, r"124 is what YAML makes of an unquoted 2:4"),
        ({"pattern": "2:4"}, r"'2:4': this is no pattern.*NofM"),
    ],
)
def test_pruner_arguments(kwargs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CAP(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_recomputations": 0}, "num_recomputations=0"),
        ({"recomputation_path": "cubic"}, "recomputation_path='cubic': choose 'exponential' or 'linear'"),
        ({"save": "best"}, "save='best' needs monitor"),
        ({"save": "sometimes"}, "save='sometimes'"),
        ({"mode": "avg"}, "mode='avg'"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_callback_arguments(kwargs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CAPPruningCallback(SparsitySteps({0: 0.5}), **kwargs)


def test_n_of_m_needs_divisible_inputs_and_no_recomputations(tmp_path: Path) -> None:
    module = Toy()
    module.net[4] = nn.Linear(16, 14)
    module.net[6] = nn.Linear(14, 4)
    module.net.insert(7, nn.Linear(4, 4))
    assert_refused(
        tmp_path,
        TargetError,
        r"'net\.6\.weight' of shape \(4, 14\).*not divisible",
        module,
        schedule={1: 0.5},
        pruner=cap(pattern=NofM(2, 4)),
    )
    assert_refused(
        tmp_path,
        ConfigError,
        "num_recomputations=2.*only one sparsity",
        schedule={1: 0.5},
        pruner=cap(pattern=NofM(2, 4)),
        num_recomputations=2,
    )
    assert_refused(
        tmp_path,
        ConfigError,
        "block_size=18 is not a multiple",
        schedule={1: 0.5},
        pruner=cap(pattern=NofM(2, 4), block_size=18),
    )


@pytest.mark.parametrize(
    ("schedule", "pruner", "message"),
    [
        (
            SparsitySteps({0: 0.5, 2: 0.9}),
            Magnitude(allocation=Global(min_density=0.3)),
            r"sparsity=0\.9: min_density=0\.3 leaves",
        ),
        (SparsitySteps({0: 0.5, 2: 0.9}), cap(allocation=Uniform(min_density=0.3)), r"sparsity=0\.9: min_density=0\.3"),
        (
            OneShot(0.9, None),
            Magnitude(allocation=PerTarget({"*": 0.5})),
            r"sparsity=0\.9: sparsities: the named targets have",
        ),
        (SparsitySteps({0: 0.5, 2: 0.9}), DropAndGrow(allocation=Global(min_density=0.3)), r"sparsity=0\.9"),
        (AlternatingSchedule(0.9, 1, 1, 1), Magnitude(allocation=Global(min_density=0.3)), r"sparsity=0\.9"),
        (AlternatingSchedule(0.5, 1, 1, 1), Magnitude(allocation=PerTarget({"*": 0.9})), r"sparsity=0\.5"),
    ],
)
def test_zeros_that_cannot_be_placed(tmp_path: Path, schedule: SparsitySchedule, pruner: Pruner, message: str) -> None:
    assert_refused(tmp_path, ConfigError, message, schedule=schedule, pruner=pruner)


def test_a_step_between_two_events_that_cannot_be_had(tmp_path: Path) -> None:
    allocation: Allocation = PerTarget({"net.4.weight": 0.75})
    both = {"schedule": {1: 0.75}, "pruner": Magnitude(allocation=allocation), "save": "none"}
    assert_refused(tmp_path, ConfigError, r"sparsity=0\.5: sparsities", num_recomputations=2, **both)
    trainer(tmp_path, callback(**both)).fit(Toy(), **loaders())


def test_zeros_that_are_there_need_no_room(tmp_path: Path) -> None:
    module = Toy()
    with torch.no_grad():
        module.net[4].weight[2:] = 0.0  # 87.5 %, beyond the floor
    cb = callback({0: 0.5, 2: 0.875}, pruner=Magnitude(allocation=Global(min_density=0.3)), save="none")
    with pytest.warns(UserWarning, match="already at 0.875"):
        trainer(tmp_path, cb).fit(module, **loaders())
    assert cb.masks.global_sparsity == 0.875


def test_frozen_tied_and_missing_targets(tmp_path: Path) -> None:
    frozen = Toy()
    frozen.net[4].requires_grad_(False)
    assert_refused(tmp_path, TargetError, r"no prunable weight left.*net\.4 \(frozen\).*unfreeze", frozen)

    tied = Toy()
    tied.twin = nn.Linear(16, 16)
    tied.twin.weight = tied.net[4].weight
    assert_refused(tmp_path, TargetError, r"tied.*exclude", tied)

    class Tiny(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(FEATURES, 4))

    assert_refused(tmp_path, TargetError, "no prunable weight", Tiny())


def test_losses_without_gradient(tmp_path: Path) -> None:
    class Detached(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx).detach()

    class Nothing(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    class Parts(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"class": super().training_step(batch, batch_idx), "box": torch.zeros(())}

    class Vector(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx).repeat(2)}

    assert_refused(tmp_path, GradientError, r"a dict of 'class', 'box', without their sum as 'loss'", Parts())
    assert_refused(tmp_path, GradientError, r"a tensor of shape \(2,\) instead of a scalar", Vector())
    assert_refused(tmp_path, GradientError, "has no gradient.*calibration_step", Detached())
    assert_refused(tmp_path, GradientError, "got a NoneType", Nothing())


def test_manual_optimization_needs_a_calibration_step(tmp_path: Path) -> None:
    module = Toy(scheduler=False)
    module.automatic_optimization = False
    for pruner in (cap(), LayerwiseOBS(block_size=16, num_inputs=40)):
        assert_refused(
            tmp_path, UnsupportedError, r"automatic_optimization=False.*calibration_step", module, pruner=pruner
        )


def test_strategies_that_shard_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Toy()
    t = trainer(tmp_path)
    monkeypatch.setattr(type(t), "strategy", FSDPStrategy(accelerator=None))
    with pytest.raises(UnsupportedError, match=r"strategy=FSDPStrategy: it shards parameters.*ddp"):
        callback().setup(t, module, "fit")


def test_training_data_that_cannot_be_drawn_from(tmp_path: Path) -> None:
    two = {**loaders(), "train_dataloaders": [DataLoader(ToyData(), 16), DataLoader(ToyData(), 16)]}

    class Pair(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch[0], batch_idx)

    assert_refused(
        tmp_path, ConfigError, "calibration needs a single DataLoader.*calibration_dataloader", Pair(), data=two
    )


def test_event_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_cap.fisher.memory_plan.free_memory", lambda device: 1000)
    assert_refused(tmp_path, ConfigError, "block_size: the pruning event needs .* MiB on cpu")


def test_a_cycle_of_unknown_length(tmp_path: Path) -> None:
    assert_refused(tmp_path, ConfigError, "period=None", trainer={"max_epochs": -1, "max_time": {"seconds": 5}})
