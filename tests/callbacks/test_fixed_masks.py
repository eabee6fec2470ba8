from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_cap import CAPPruningCallback
from lightning_cap.callbacks.fixed_masks import FixedMasks
from lightning_cap.callbacks.state import pruned_units
from lightning_cap.errors import DataError, UnsupportedError
from lightning_cap.pruners import Magnitude, MagnitudeUnits
from lightning_cap.schedules import OneShot
from tests.support.stopping import CrashError, StopAfter, assert_same, averaging
from tests.support.toy import TARGET, Toy, callback, loaders, trainer, zeros


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A Lightning checkpoint of half of the weights."""
    return checkpoint_of(tmp_path_factory.mktemp("pruned"), Magnitude())


def checkpoint_of(folder: Path, pruner: Any) -> dict[str, Any]:
    pl.seed_everything(3, verbose=False)
    trainer(folder, callback(OneShot(0.5, epoch=1), pruner=pruner), max_epochs=2).fit(Toy(), **loaders())
    held: dict[str, Any] = torch.load(next(folder.rglob("*=0.50.ckpt")), weights_only=True)
    return held


def fine_tune(
    folder: Path, held: dict[str, Any], *others: Any, seed: int = 5, ckpt: str | None = None, **kwargs: Any
) -> tuple[Toy, FixedMasks]:
    pl.seed_everything(seed, verbose=False)
    module = Toy(kwargs.pop("optimizer", "adamw"))
    module.load_state_dict(held["state_dict"])
    masks = FixedMasks(next(iter(held["callbacks"].values())))
    with contextlib.suppress(CrashError):
        trainer(folder, masks, *others, **{"max_epochs": 3, **kwargs}).fit(module, **loaders(), ckpt_path=ckpt)
    return module, masks


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_zeros_stay_and_the_rest_is_trained(tmp_path: Path, pruned: dict[str, Any], optimizer: str) -> None:
    module, masks = fine_tune(tmp_path, pruned, optimizer=optimizer)
    before, after = pruned["state_dict"][TARGET], module.state_dict()[TARGET]
    assert (before == 0).float().mean() == 0.5
    assert torch.equal(before == 0, after == 0)
    assert torch.equal(masks.masks[TARGET], after != 0)
    assert (before != after).sum() == (before != 0).sum()
    state = masks.masks.targets[TARGET]
    (of_optimizer,) = module.trainer.optimizers
    for value in of_optimizer.state[state].values():
        if isinstance(value, torch.Tensor) and value.shape == before.shape:
            assert not value[before == 0].any()


def test_zeros_stay_in_averages(tmp_path: Path, pruned: dict[str, Any]) -> None:
    module, _ = fine_tune(tmp_path, pruned, averaging())
    assert torch.equal(zeros(module), pruned["state_dict"][TARGET] == 0)


def test_the_learning_rate_falls_once(tmp_path: Path, pruned: dict[str, Any]) -> None:
    rates = []

    class Note(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fine_tune(tmp_path, pruned, Note())
    assert len(rates) == 12
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1e-2 - (1e-2 - 1e-4) * 11 / 12)


@pytest.mark.parametrize("saver", [{}, {"save_on_train_epoch_end": True}], ids=str)
def test_a_stopped_run_goes_on_exactly(tmp_path: Path, pruned: dict[str, Any], saver: dict[str, Any]) -> None:
    whole, _ = fine_tune(tmp_path / "whole", pruned)
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **saver)
    fine_tune(tmp_path / "cut", pruned, keep, StopAfter(2), enable_checkpointing=True)
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    resumed, masks = fine_tune(tmp_path / "cut", pruned, seed=99, ckpt=str(last))
    assert_same(whole, resumed)
    assert torch.equal(masks.masks[TARGET], pruned["state_dict"][TARGET] != 0)


def test_units_stay_pruned_and_can_be_cut_out(tmp_path: Path) -> None:
    held = checkpoint_of(tmp_path / "units", MagnitudeUnits())
    keep = ModelCheckpoint(tmp_path / "tuned", "last")
    module, masks = fine_tune(tmp_path, held, keep, enable_checkpointing=True)
    for name, mask in masks.masks.items():
        assert not module.state_dict()[name][~mask].any()
    assert masks.masks.global_sparsity > 0
    before, after = (
        pruned_units(c["callbacks"]) for c in (held, torch.load(tmp_path / "tuned/last.ckpt", weights_only=True))
    )
    assert before is not None
    assert after is not None
    assert list(before[0]) == list(after[0])
    assert all(torch.equal(before[1][name], mask) for name, mask in after[1].items())


def test_refuses_what_prunes_on(tmp_path: Path, pruned: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="CAPPruningCallback prunes on"):
        fine_tune(tmp_path, pruned, CAPPruningCallback({0: 0.9}))


def test_a_damaged_state_is_refused(pruned: dict[str, Any]) -> None:
    state = next(iter(pruned["callbacks"].values()))
    with pytest.raises(DataError, match="version 77"):
        FixedMasks({**state, "version": 77})
