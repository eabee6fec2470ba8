"""What the steps of an event may be, refused before training where they may not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_cap.errors import ConfigError, PatternError, UnsupportedError
from lightning_cap.pruners import Magnitude, Pruner
from lightning_cap.schedules import RepeatedSchedule, SparsitySchedule, SparsitySteps
from lightning_cap.sparsity.patterns import BlockOf, OutputRows, check_pattern
from tests.support.regrowing import ACDC, fit, rigl
from tests.support.toy import Toy, callback, cap, loaders, trainer, zeros

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("pruner", [cap(pattern=BlockOf(4)), Magnitude(pattern=OutputRows())], ids=["blocks", "rows"])
def test_a_decrease_that_would_break_the_pattern_is_refused_before_training(tmp_path: Path, pruner: Pruner) -> None:
    module, message = Toy(), r"pattern=.*falls from 0\.75 to 0\.5.*Unstructured"
    cb = callback(SparsitySteps({0: 0.75, 2: 0.5}, allow_decrease=True), pruner=pruner, save="none")
    with pytest.raises(PatternError, match=message):
        trainer(tmp_path, cb).fit(module, **loaders())
    assert not zeros(module).any()
    with torch.no_grad():
        module.net[4].weight[4:] = 0.0
    cb = callback(SparsitySteps({1: 0.5}, allow_decrease=True), pruner=pruner, save="none")
    with pytest.raises(PatternError, match=message):
        trainer(tmp_path, cb).fit(module, **loaders())
    assert module.batches == []
    lifted = callback(SparsitySteps({0: 0.75, 1: 0, 2: 0.5}, allow_decrease=True), pruner=pruner, save="none")
    trainer(tmp_path, lifted).fit(module, **loaders())
    check_pattern(lifted._active.targets, pruner.pattern)


def test_growth_without_a_calibration_step_is_refused_before_training(tmp_path: Path) -> None:
    class Manual(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    falling = SparsitySteps({0: 0.75, 2: 0.5}, allow_decrease=True)
    for schedule, pruner in ((falling, Magnitude()), (RepeatedSchedule(0.5), rigl())):
        with pytest.raises(UnsupportedError, match="calibration_step"):
            trainer(tmp_path, callback(schedule, pruner=pruner)).fit(Manual(), **loaders())


def test_recomputations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_recomputations=2: DropAndGrow exchanges"):
        fit(tmp_path, RepeatedSchedule(0.5), rigl(), callback={"num_recomputations": 2})


@pytest.mark.parametrize("schedule", [ACDC, RepeatedSchedule(0.5, frequency=2)])
def test_fast_dev_run(tmp_path: Path, schedule: SparsitySchedule) -> None:
    cb = callback(schedule, pruner=rigl())
    trainer(tmp_path, cb, fast_dev_run=True, max_epochs=None).fit(Toy(), **loaders())
    assert cb.masks.global_sparsity == next(iter(schedule.events(9).values()))
