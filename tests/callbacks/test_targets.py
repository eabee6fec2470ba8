"""Which weights a run prunes is told by a forward pass when training starts, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_cap.callbacks import targets
from lightning_cap.errors import ConfigError, TargetError
from lightning_cap.pruners import Magnitude
from tests.support.distilling import STUDENT_TARGETS, Student
from tests.support.stopping import assert_same
from tests.support.toy import TARGET, Toy, callback, loaders, trainer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every forward pass that is to tell the ends."""
    calls: list[int] = []
    real = targets.find_module_ends
    monkeypatch.setattr(targets, "find_module_ends", lambda *args: calls.append(1) or real(*args))
    return calls


def fit(path: Path, module: Any, *, ckpt: Path | None = None, **kwargs: Any) -> Any:
    torch.manual_seed(5)
    cb = callback({0: 0.5, 1: 0.75}, **{"pruner": Magnitude(), "dirpath": str(path / "pruned"), **kwargs})
    trainer(path, cb, max_epochs=2).fit(module, **loaders(), ckpt_path=None if ckpt is None else str(ckpt))
    return cb


@pytest.mark.parametrize("exclude", [None, ["teacher.*"]])
def test_the_students_heads_and_the_teacher_stay_dense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, exclude: list[str] | None
) -> None:
    module = Student()
    with caplog.at_level("INFO"):
        assert list(fit(tmp_path, module, exclude=exclude).masks) == STUDENT_TARGETS
    why = "excluded" if exclude else "frozen"
    told = f"dense: net.0 (first), aux (last), net.6 (last), teacher.0 ({why}), teacher.1 ({why}), teacher.2 ({why})"
    assert f"Pruning 1 target, 21.4 % of 1.2 k weights; {told}" in caplog.text
    assert all((w != 0).all() for name, w in module.named_parameters() if name != TARGET)


def test_layers_whose_weights_are_computed_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = Toy()
    module.net.insert(5, nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)))
    with caplog.at_level("INFO"):
        fit(tmp_path, module)
    assert "net.5 (parametrized by WeightNorm)" in caplog.text


def test_a_run_that_goes_on_does_not_ask_again(tmp_path: Path, asked: list[int]) -> None:
    whole = Student()
    fit(tmp_path / "whole", whole)
    module = Student()
    cb = fit(tmp_path, module, ckpt=tmp_path / "whole/pruned/sparsity=0.50.ckpt")
    assert len(asked) == 1
    assert list(cb.masks) == STUDENT_TARGETS
    assert_same(whole, module)


def test_a_second_fit_of_the_same_model_does_not_ask_again(tmp_path: Path, asked: list[int]) -> None:
    module = Student()
    cb = callback({0: 0.5}, pruner=Magnitude(), save="none")
    for _ in range(2):
        trainer(tmp_path, cb, max_epochs=1).fit(module, **loaders())
    assert len(asked) == 1
    assert cb.masks.global_sparsity == 0.5
    trainer(tmp_path, cb, max_epochs=1).fit(Student(), **loaders())
    assert len(asked) == 2


def test_names_need_no_forward_pass(tmp_path: Path, asked: list[int]) -> None:
    cb = fit(tmp_path, Student(), include=["net.6.weight", "aux.weight"])
    assert set(cb.masks) == {"net.6.weight", "aux.weight"}
    assert asked == []


def test_going_on_with_other_names_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, Student(), include=[TARGET, "net.0.weight"])
    for options in ({}, {"include": [TARGET]}):
        with pytest.raises(ConfigError, match=r"masks do not fit the targets.*net\.0\.weight"):
            fit(tmp_path, Student(), ckpt=tmp_path / "pruned/sparsity=0.50.ckpt", **options)
    fit(tmp_path / "other", Student())
    with pytest.raises(TargetError, match="no prunable weight left"):
        fit(tmp_path, Student(), ckpt=tmp_path / "other/pruned/sparsity=0.50.ckpt", exclude=[TARGET])


def test_the_forward_pass_comes_after_the_hooks_that_begin_a_fit(tmp_path: Path) -> None:
    class Late(Student):
        def on_fit_start(self) -> None:
            self.weights = torch.ones(4)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * self.weights.mean()

    assert list(fit(tmp_path, Late()).masks) == STUDENT_TARGETS


def test_a_fit_that_trains_nothing_asks_nothing(tmp_path: Path, asked: list[int]) -> None:
    cb = callback({0: 0.5}, pruner=Magnitude(), save="none")
    with pytest.warns(UserWarning, match="Nothing was trained"):
        trainer(tmp_path, cb, max_epochs=1, limit_train_batches=0).fit(Student(), **loaders())
    assert asked == []
    assert cb.state_dict()["masks"] is None
    trainer(tmp_path, cb, max_epochs=1).fit(Student(), **loaders())
    assert list(cb.masks) == STUDENT_TARGETS
